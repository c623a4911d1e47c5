"""EVA-CLIP ViT-g/14 under LaVIT's names."""

from typing import Any

from unimm_jax.interop.encoders.base import EncoderLayout
from unimm_jax.interop.layers import fused_attention, mlp, norm, patches
from unimm_jax.interop.published import Settings
from unimm_jax.interop.table import Entry


def table(layers: int, biases: str = "qv", ours: str = "encoder/", theirs: str = "") -> list[Entry]:
    """The names of an encoder; `theirs` is a prefix of the foreign names."""
    block, name = f"{ours}blocks", theirs + "blocks.{}"
    return [
        Entry(f"{ours}cls", f"{theirs}cls_token", "batched2"),
        Entry(f"{ours}positions", f"{theirs}pos_embed", "batched"),
        *patches(f"{ours}patch_embed", f"{theirs}patch_embed.proj"),
        *norm(f"{block}/norm1", f"{name}.norm1", layers),
        *fused_attention(f"{block}/attention", f"{name}.attn", layers, biases),
        *norm(f"{block}/norm2", f"{name}.norm2", layers),
        *mlp(f"{block}/mlp", f"{name}.mlp", layers),
    ]


def arguments(_: Settings) -> dict[str, Any]:
    """`ViTConfig`'s arguments that are particular to EVA-CLIP."""
    return dict(biases="qv")


# the final norm and the head are in the file, but LaVIT does not use them
LAYOUT = EncoderLayout(("eva",), table, r"(norm|head)\.(weight|bias)", {}, arguments)
