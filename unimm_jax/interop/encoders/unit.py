"""A ViT under timm's names in the shape of UNIT, with a bias in the patch embedding and fixed positions."""

from typing import Any

from unimm_jax.interop.encoders.base import EncoderLayout
from unimm_jax.interop.layers import fused_attention, mlp, norm, patches
from unimm_jax.interop.published import Settings
from unimm_jax.interop.table import Entry


def table(layers: int, biases: str = "qkv", ours: str = "encoder/") -> list[Entry]:
    """The names of an encoder."""
    block, name = f"{ours}blocks", "blocks.{}"
    return [
        Entry(f"{ours}cls", "cls_token", "batched2"),
        Entry(f"{ours}positions", "pos_embed", "batched"),
        *patches(f"{ours}patch_embed", "patch_embed.proj"),
        *norm(f"{block}/norm1", f"{name}.norm1", layers),
        *fused_attention(f"{block}/attention", f"{name}.attn", layers, biases),
        *norm(f"{block}/norm2", f"{name}.norm2", layers),
        *mlp(f"{block}/mlp", f"{name}.mlp", layers),
        *norm(f"{ours}norm", "norm"),
    ]


def arguments(_: Settings) -> dict[str, Any]:
    """`ViTConfig`'s arguments that are particular to UNIT."""
    return dict(output_norm="affine")


LAYOUT = EncoderLayout(("unit",), table, r"(head|fc_norm)\..*", {}, arguments)
