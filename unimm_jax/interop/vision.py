"""Vision encoders: EVA-CLIP ViT-g/14 (LaVIT's names, and BLIP-2's), CLIP, SigLIP, and timm's ViT names (UNIT).

Each layout is one function that turns the published `config.json` into `ViTConfig`'s arguments and one table. What a
layout holds besides (final norms and heads that nobody reads, text towers) is named in `UNUSED`.
"""

import re
from typing import Any

from unimm_jax.interop import lavit
from unimm_jax.interop.llama import Unsupported
from unimm_jax.interop.table import Entry

ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh"}

# layout → names that a file may hold beyond the table.
UNUSED = {
    "eva": r"(norm|head)\.(weight|bias)",
    "blip2": r"(?!vision_model\.).*|.*position_ids",
    "clip": r"(?!vision_model\.).*|vision_model\.post_layernorm\..*|.*position_ids",
    "siglip": r"(?!vision_model\.).*|vision_model\.head\..*|.*position_ids",
    "unit": r"(head|fc_norm)\..*",
}
MODEL_TYPES = {
    "blip_2_vision_model": "blip2",
    "blip-2": "blip2",
    "clip_vision_model": "clip",
    "clip": "clip",
    "siglip_vision_model": "siglip",
    "siglip": "siglip",
    "unit": "unit",
    "eva": "eva",
}


def layout_of(published: dict[str, Any]) -> str | None:
    """The layout's name by a published config's `model_type`; None if it is no vision encoder known here."""
    return MODEL_TYPES.get(published.get("model_type", ""))


def vit_config(layout: str, published: dict[str, Any]) -> dict[str, Any]:
    """`ViTConfig`'s arguments from a published `config.json` (its `vision_config` where it holds a text tower, too).

    Raises:
      Unsupported: an activation or shape with no counterpart here, by name.
    """
    p = published.get("vision_config") or published
    act = p.get("hidden_act", "gelu")
    if act not in ACTIVATIONS:
        raise Unsupported(
            f"this config.json cannot be represented: hidden_act {act!r} (known: {', '.join(ACTIVATIONS)})"
        )
    if p.get("num_channels", 3) != 3:
        raise Unsupported(f"this config.json cannot be represented: num_channels {p['num_channels']} (3 only)")
    width = p["hidden_size"]
    found: dict[str, Any] = dict(
        image_size=p["image_size"],
        patch_size=p["patch_size"],
        width=width,
        depth=p["num_hidden_layers"],
        heads=p["num_attention_heads"],
        mlp_width=p.get("intermediate_size") or int(width * p.get("mlp_ratio", 4)),
        activation=ACTIVATIONS[act],
        eps=p.get("layer_norm_eps", 1e-6),
        biases="qkv",
    )
    if layout == "eva":
        found |= dict(biases="qv")
    elif layout == "blip2":
        found |= dict(biases="qkv" if p.get("qkv_bias", True) else "", output_norm="affine")
    elif layout == "clip":
        found |= dict(patch_bias=False, input_norm=True)
    elif layout == "siglip":
        found |= dict(class_token=False, output_norm="affine")
    elif layout == "unit":
        found |= dict(output_norm="affine")
    return found


def table(layout: str, layers: int, biases: str = "qkv", ours: str = "encoder/") -> list[Entry]:
    """The names of a layout with `layers` blocks."""
    block, v = f"{ours}blocks", "vision_model."
    if layout == "eva":
        return lavit.encoder(ours, "", layers)
    if layout == "unit":
        name = "blocks.{}"
        return [
            Entry(f"{ours}cls", "cls_token", "batched2"),
            Entry(f"{ours}positions", "pos_embed", "batched"),
            *_patches(ours, "patch_embed.proj"),
            *lavit.norm(f"{block}/norm1", f"{name}.norm1", layers),
            *lavit.fused_attention(f"{block}/attention", f"{name}.attn", layers),
            *lavit.norm(f"{block}/norm2", f"{name}.norm2", layers),
            *lavit.mlp(f"{block}/mlp", f"{name}.mlp", layers),
            *lavit.norm(f"{ours}norm", "norm"),
        ]
    name = v + "encoder.layers.{}"
    norms = lavit.norm(f"{block}/norm1", f"{name}.layer_norm1", layers) + lavit.norm(
        f"{block}/norm2", f"{name}.layer_norm2", layers
    )
    feed = lavit.mlp(f"{block}/mlp", f"{name}.mlp", layers)
    if layout == "blip2":
        attention = []
        for index, part in enumerate("qkv"):
            kernel, bias = f"{block}/attention/{part}/kernel", f"{block}/attention/{part}/bias"
            attention.append(Entry(kernel, f"{name}.self_attn.qkv.weight", "heads", layers, part=(index, 3)))
            if biases:
                attention.append(Entry(bias, f"{name}.self_attn.qkv.bias", "heads_bias", layers, part=(index, 3)))
        return [
            Entry(f"{ours}cls", f"{v}embeddings.class_embedding", "batched2"),
            Entry(f"{ours}positions", f"{v}embeddings.position_embedding", "batched"),
            *_patches(ours, f"{v}embeddings.patch_embedding"),
            *attention,
            *lavit.output(f"{block}/attention/o", f"{name}.self_attn.projection", layers),
            *norms,
            *feed,
            *lavit.norm(f"{ours}norm", f"{v}post_layernorm"),
        ]
    split = lavit.attention(
        f"{block}/attention", f"{name}.self_attn", layers, ("q_proj", "k_proj", "v_proj", "out_proj")
    )
    places = Entry(f"{ours}positions", f"{v}embeddings.position_embedding.weight")
    if layout == "clip":
        return [
            Entry(f"{ours}cls", f"{v}embeddings.class_embedding"),
            places,
            *_patches(ours, f"{v}embeddings.patch_embedding", bias=False),
            *lavit.norm(f"{ours}input_norm", f"{v}pre_layrnorm"),
            *split,
            *norms,
            *feed,
        ]
    if layout == "siglip":
        return [
            places,
            *_patches(ours, f"{v}embeddings.patch_embedding"),
            *split,
            *norms,
            *feed,
            *lavit.norm(f"{ours}norm", f"{v}post_layernorm"),
        ]
    raise Unsupported(f"there is no vision layout {layout!r}; known are {', '.join(UNUSED)}")


def _patches(ours: str, theirs: str, bias: bool = True) -> list[Entry]:
    kernel = Entry(f"{ours}patch_embed/kernel", f"{theirs}.weight", "patch")
    return [kernel, Entry(f"{ours}patch_embed/bias", f"{theirs}.bias")] if bias else [kernel]


def full_name(layout: str, name: str) -> str:
    """A tensor's name with the `vision_model.` that a file of the vision tower alone may leave out."""
    bare = re.match(r"(embeddings|encoder\.layers|pre_layrnorm|post_layernorm|head)\b", name)
    return f"vision_model.{name}" if layout in ("blip2", "clip", "siglip") and bare else name


def unused(layout: str, name: str) -> bool:
    """Whether a tensor of a file may be left where it is."""
    return re.fullmatch(UNUSED[layout], name) is not None
