"""Stable Diffusion's U-Nets (1.5 and SDXL) and autoencoder under the names of `diffusers`.

Block structure varies with the config, so these tables are derived from the parameters' own paths, rule by rule.
"""

import re
from collections.abc import Mapping
from typing import Any

from unimm_jax.errors import UnsupportedConfigError
from unimm_jax.interop.published import MAX_INTEGER
from unimm_jax.interop.table import Entry, Shape

# settings of unet/config.json that have one value here; other values are refused by name
UNET_FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "downsample_padding": (1,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "num_attention_heads": (None,),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_type": ("positional",),
    "addition_embed_type": (None, "text_time"),
}
UNET_KEYS = (
    "in_channels", "out_channels", "block_out_channels", "down_block_types", "up_block_types", "layers_per_block",
    "transformer_layers_per_block", "attention_head_dim", "cross_attention_dim", "norm_num_groups", "norm_eps",
    "addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim",
)  # fmt: skip
UNET_INTEGERS = (
    "in_channels", "out_channels", "block_out_channels", "layers_per_block", "transformer_layers_per_block",
    "attention_head_dim", "cross_attention_dim", "norm_num_groups", "addition_time_embed_dim",
    "projection_class_embeddings_input_dim",
)  # fmt: skip
VAE_FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu",),
    "use_quant_conv": (True,),
    "use_post_quant_conv": (True,),
    "mid_block_add_attention": (True,),
    "shift_factor": (None,),
    "latents_mean": (None,),
}
VAE_KEYS = (
    "in_channels", "out_channels", "latent_channels", "block_out_channels", "layers_per_block", "norm_num_groups",
    "scaling_factor",
)  # fmt: skip
VAE_INTEGERS = (
    "in_channels", "out_channels", "latent_channels", "block_out_channels", "layers_per_block", "norm_num_groups",
)  # fmt: skip

_NAMES = [
    (r"(down|up)/(\d+)/sampler", r"\1_blocks.\2.\1samplers.0.conv"),
    (r"(down|up)/(\d+)/", r"\1_blocks.\2."),
    (r"mixers/(\d+)/", r"attentions.\1."),
    (r"resnets/(\d+)/", r"resnets.\1."),
    (r"mid1/", "mid_block.resnets.0."),
    (r"mid2/", "mid_block.resnets.1."),
    (r"mid_mixer/", "mid_block.attentions.0."),
    (r"mid/resnet1/", "mid_block.resnets.0."),
    (r"mid/resnet2/", "mid_block.resnets.1."),
    (r"mid/mixer/", "mid_block.attentions.0."),
    (r"blocks/(\d+)/", r"transformer_blocks.\1."),
    (r"(time|add)_embedding(\d)", r"\1_embedding.linear_\2"),
    (r"attention/([qkv])/", r"to_\1."),
    (r"attention/o/", "to_out.0."),
    (r"to_out/", "to_out.0."),
    (r"ff_in/", "ff.net.0.proj."),
    (r"ff_out/", "ff.net.2."),
    (r"(kernel|scale)$", "weight"),
    (r"/", "."),
]


def unet_config(published: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """(`UNetConfig`'s arguments, whether proj_in and proj_out are linear layers) from `unet/config.json`.

    Raises:
      UnsupportedConfigError: lists every setting with no counterpart here.
    """
    kinds = {"CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"}
    wrong = _wrong(published, UNET_FIXED) + _not_integers(published, UNET_INTEGERS)
    wrong += [f"block type {b!r}" for b in _block_types(published) if b not in kinds]
    if isinstance(published.get("layers_per_block", 2), list):
        wrong.append("layers_per_block differs between levels")
    levels = published.get("block_out_channels")
    for name in (*UNET_INTEGERS, "down_block_types", "up_block_types"):
        value = published.get(name)
        if isinstance(levels, list | tuple) and isinstance(value, list | tuple) and len(value) != len(levels):
            wrong.append(f"{name} has {len(value)} values for {len(levels)} levels")
    if wrong:
        raise UnsupportedConfigError("this U-Net config cannot be represented: " + "; ".join(wrong))
    found = {k: published[k] for k in UNET_KEYS if published.get(k) is not None}
    return _tuples(found), bool(published.get("use_linear_projection", False))


def vae_config(published: dict[str, Any]) -> dict[str, Any]:
    """`VAEConfig`'s arguments from `vae/config.json`.

    Raises:
      UnsupportedConfigError: lists every setting with no counterpart here.
    """
    wrong = _wrong(published, VAE_FIXED) + _not_integers(published, VAE_INTEGERS)
    if not isinstance(published.get("scaling_factor") or 1.0, int | float):
        wrong.append(f"scaling_factor {published['scaling_factor']!r}")
    known = {"DownEncoderBlock2D", "UpDecoderBlock2D"}
    wrong += [f"block type {b!r}" for b in _block_types(published) if b not in known]
    if wrong:
        raise UnsupportedConfigError("this VAE config cannot be represented: " + "; ".join(wrong))
    return _tuples({k: published[k] for k in VAE_KEYS if published.get(k) is not None})


def published_unet(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`unet/config.json` from `UNetConfig`'s values; the inverse of `unet_config`."""
    found = {"_class_name": "UNet2DConditionModel"} | {k: settings[k] for k in UNET_KEYS}
    if not settings["addition_embed_type"]:
        for key in ("addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim"):
            found.pop(key)
    return found | {"use_linear_projection": linear_projection(settings)}


def linear_projection(settings: Mapping[str, Any]) -> bool:
    """Whether proj_in and proj_out are written as linear layers: SDXL's are, Stable Diffusion 1.5's are not."""
    return bool(settings["addition_embed_type"])


def published_vae(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`vae/config.json` from `VAEConfig`'s values; the inverse of `vae_config`."""
    levels = len(settings["block_out_channels"])
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    return {"_class_name": "AutoencoderKL"} | {k: settings[k] for k in VAE_KEYS} | blocks


# what the samplers here do, as settings of DDIMScheduler of `diffusers`
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


def _wrong(published: dict[str, Any], fixed: dict[str, tuple[Any, ...]]) -> list[str]:
    return [f"{k} {published[k]!r}" for k, values in fixed.items() if k in published and published[k] not in values]


def _not_integers(published: dict[str, Any], names: tuple[str, ...]) -> list[str]:
    """Settings whose value is neither a positive integer nor a list of positive integers."""
    found = []
    for name in names:
        value = published.get(name)
        items = value if isinstance(value, list | tuple) else [value]
        is_fine = value is None or (items and all(type(x) is int and 0 < x < MAX_INTEGER for x in items))
        if not is_fine:
            found.append(f"{name} {value!r}")
    return found


def _block_types(published: dict[str, Any]) -> list[str]:
    found: list[str] = []
    for name in ("down_block_types", "up_block_types"):
        value = published.get(name) or ()
        found += [str(item) for item in value] if isinstance(value, list | tuple) else [str(value)]
    return list(dict.fromkeys(found))


def _tuples(config: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}


def table(shapes: Mapping[str, Shape], prefix: str, linear_projection: bool = False) -> list[Entry]:
    """The names of a U-Net or an autoencoder.

    Args:
      shapes: path → shape of the model's parameters. prefix: what their paths begin with, "unet/" or "vae/".
      linear_projection: proj_in and proj_out are linear layers (SDXL), not 1 × 1 convolutions.
    """
    found = []
    for path, shape in shapes.items():
        if not path.startswith(prefix):
            continue
        name = path.removeprefix(prefix)
        for pattern, replacement in _NAMES:
            name = re.sub(pattern, replacement, name)
        if path.endswith("kernel") and len(shape) == 4:
            transform = "conv"
        elif path.endswith("kernel") and len(shape) == 3:
            transform = "output" if "to_out" in name else "heads"
        elif path.endswith("kernel"):
            transform = "pointwise" if re.search(r"proj_(in|out)\.", name) and not linear_projection else "linear"
        else:
            transform = "heads_bias" if len(shape) == 2 else "same"
        found.append(Entry(path, name, transform))
    return found


def modern_name(name: str) -> str:
    """The current name of an autoencoder's attention tensor that an old file calls query, key, value or proj_attn."""
    old = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    return re.sub(r"attentions\.0\.(query|key|value|proj_attn)\.", lambda m: f"attentions.0.{old[m[1]]}.", name)
