"""Names of the published LaVIT (github.com/jy0205/LaVIT), file by file, and the architecture read from the shapes.

| file | table |
|---|---|
| `visual_tokenizer/eva_vitg_psz14.bin` | `unimm_jax.interop.encoders.eva` |
| `visual_tokenizer/tokenizer_encoder.bin` | `tokenizer_encoder` |
| `visual_tokenizer/tokenizer_decoder.bin`, `highres_tokenizer_decoder.bin` | `feature_decoder` |
| `language_model/visual_weight.bin` | `visual_weight` |
| `language_model/pytorch_model-*.bin` | `unimm_jax.interop.llama` |

There are two mergers. That of `tokenizer_encoder.bin` makes the codes; that of `visual_weight.bin` was trained with the
language model. They are two parameters here, too.
"""

import re
from collections.abc import Mapping
from typing import Any

from unimm_jax.errors import WeightMismatchError
from unimm_jax.interop.layers import attention, fused_attention, linear, mlp, norm
from unimm_jax.interop.table import Entry, Shape

# our name of a U-Net decoder → its folder
PIXEL_FOLDERS = {"unet_decoder": "pixel_decoding", "unet_decoder_high": "highres_pixel_decoding"}


def selector(ours: str, theirs: str) -> list[Entry]:
    """`token_predictor`."""
    return [
        *norm(f"{ours}norm", f"{theirs}in_conv.0"),
        *linear(f"{ours}inner", f"{theirs}in_conv.1"),
        *linear(f"{ours}out1", f"{theirs}out_conv.0"),
        *linear(f"{ours}out2", f"{theirs}out_conv.2"),
        *linear(f"{ours}out3", f"{theirs}out_conv.4"),
    ]


def merger(ours: str, theirs: str, layers: int) -> list[Entry]:
    """`causal_encoder`."""
    block, name = f"{ours}blocks", theirs + "blocks.{}"
    return [
        *norm(f"{block}/norm0", f"{name}.norm0", layers),
        *fused_attention(f"{block}/causal", f"{name}.token_causal_attn", layers),
        *norm(f"{block}/norm1", f"{name}.norm1", layers),
        *attention(f"{block}/cross", f"{name}.token_cross_attn", layers),
        *norm(f"{block}/norm2", f"{name}.norm2", layers),
        *mlp(f"{block}/mlp", f"{name}.mlp", layers),
        *norm(f"{ours}source_norm", f"{theirs}ln_vision"),
        *norm(f"{ours}norm", f"{theirs}norm"),
    ]


def quantizer(ours: str, theirs: str = "") -> list[Entry]:
    """Codebook and projection to the code space."""
    return [
        Entry(f"{ours}codebook", f"{theirs}quantize.embedding.weight"),
        *linear(f"{ours}proj1", f"{theirs}encode_task_layer.0"),
        *linear(f"{ours}proj2", f"{theirs}encode_task_layer.2"),
    ]


def tokenizer_encoder(layers: int, theirs: str = "") -> list[Entry]:
    """`tokenizer_encoder.bin`: selector, the merger that makes codes, quantizer."""
    return [
        *selector("selector/", f"{theirs}token_predictor."),
        *merger("merger/", f"{theirs}causal_encoder.", layers),
        *quantizer("quantizer/", theirs),
    ]


def visual_weight(layers: int, theirs: str = "") -> list[Entry]:
    """`visual_weight.bin`: the merger that was trained with the language model, and the adapter."""
    return [
        *merger("merger/", f"{theirs}causal_encoder.", layers),
        *linear("adapter", f"{theirs}vit_proj"),
    ]


def feature_decoder(layers: int, conditioner: str) -> list[Entry]:
    """Decoder and conditioner: "low" is `tokenizer_decoder.bin` (SD 1.5), "high" the `highres_` file (SDXL)."""
    block, name = "decoder/blocks", "blocks.{}"
    table = [
        Entry("decoder/positions", "pos_embed", "batched"),
        Entry("decoder/queries", "query_embed", "batched"),
        *linear("decoder/inner", "in_proj"),
        *norm(f"{block}/norm0", f"{name}.norm0", layers),
        *fused_attention(f"{block}/attention", f"{name}.self_attn", layers),
        *norm(f"{block}/norm1", f"{name}.norm1", layers),
        *attention(f"{block}/cross", f"{name}.cross_attn", layers),
        *norm(f"{block}/norm2", f"{name}.norm2", layers),
        *mlp(f"{block}/mlp", f"{name}.mlp", layers),
        *norm("decoder/norm", "norm"),
        *linear("decoder/out1", "decode_task_layer.0"),
        *linear("decoder/out2", "decode_task_layer.2"),
    ]
    if conditioner == "low":
        return table + linear("conditioner/context", "unet_proj")
    pool = "unet_attnpool"
    return [
        *table,
        *linear("conditioner/context1", "unet_proj_1"),
        *linear("conditioner/context2", "unet_proj_2"),
        Entry("conditioner/pool/positions", f"{pool}.positional_embedding"),
        *attention("conditioner/pool/attention", pool, 0, ("q_proj", "k_proj", "v_proj", "c_proj")),
    ]


# ---- Shapes: LaVIT's files carry no config, so the architecture is read from the tensors -----------------------------


def _depth(shapes: Mapping[str, Shape], pattern: str) -> int:
    return 1 + max((int(m[1]) for name in shapes if (m := re.match(pattern, name))), default=-1)


def _need(shapes: Mapping[str, Shape], ranks: dict[str, int]) -> None:
    """Checks that tensors are present and have the given number of axes."""
    missing = [name for name, rank in ranks.items() if len(shapes.get(name, ())) != rank]
    if missing:
        raise WeightMismatchError(
            f"this is not LaVIT's layout: {', '.join(missing)} are missing or have another number of axes"
        )


def encoder_shape(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """`ViTConfig`'s arguments from the encoder file. Heads are 88 wide as published, 16 if 88 does not divide."""
    _need(shapes, {"pos_embed": 3, "patch_embed.proj.weight": 4, "blocks.0.mlp.fc1.weight": 2})
    tokens, width = shapes["pos_embed"][1:]
    patch = shapes["patch_embed.proj.weight"][2]
    return dict(
        image_size=round((tokens - 1) ** 0.5) * patch,
        patch_size=patch,
        width=width,
        depth=_depth(shapes, r"blocks\.(\d+)\."),
        heads=width // 88 if width % 88 == 0 else width // 16,
        mlp_width=shapes["blocks.0.mlp.fc1.weight"][0],
    )


def tokenizer_shape(encoder_file: Mapping[str, Shape], decoder_file: Mapping[str, Shape]) -> dict[str, Any]:
    """`ImageTokenizerConfig`'s arguments from `tokenizer_encoder.bin` and `tokenizer_decoder.bin`."""
    _need(encoder_file, {"quantize.embedding.weight": 2, "causal_encoder.blocks.0.mlp.fc1.weight": 2})
    codes, code_width = encoder_file["quantize.embedding.weight"]
    hidden, width = encoder_file["causal_encoder.blocks.0.mlp.fc1.weight"]
    return dict(
        heads=width // 88 if width % 88 == 0 else width // 16,
        mlp_width=hidden,
        merger_depth=_depth(encoder_file, r"causal_encoder\.blocks\.(\d+)\."),
        decoder_depth=_depth(decoder_file, r"blocks\.(\d+)\."),
        codes=codes,
        code_width=code_width,
    )


def conditioner_shape(decoder_file: Mapping[str, Shape], heads: int) -> dict[str, Any]:
    """`ConditionerConfig`'s arguments from one of the two decoder files."""
    if "unet_proj_1.weight" in decoder_file:
        _need(decoder_file, {"unet_proj_1.weight": 2, "unet_proj_2.weight": 2})
        widths = decoder_file["unet_proj_1.weight"][0], decoder_file["unet_proj_2.weight"][0]
        return dict(context=widths[0], pooled=widths[1], heads=heads)
    _need(decoder_file, {"unet_proj.weight": 2})
    return dict(context=decoder_file["unet_proj.weight"][0], pooled=0, heads=heads)
