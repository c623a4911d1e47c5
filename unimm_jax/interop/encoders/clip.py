"""CLIP's vision model, Hugging Face names."""

from typing import Any

from unimm_jax.interop.encoders.base import EncoderLayout
from unimm_jax.interop.layers import attention, mlp, norm, patches
from unimm_jax.interop.published import Settings
from unimm_jax.interop.table import Entry

DEFAULTS = dict(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=224,
    patch_size=32, hidden_act="quick_gelu", layer_norm_eps=1e-5,
)  # fmt: skip


def table(layers: int, biases: str = "qkv", ours: str = "encoder/") -> list[Entry]:
    """The names of the vision model."""
    del biases  # always all three
    block, name = f"{ours}blocks", "vision_model.encoder.layers.{}"
    names = ("q_proj", "k_proj", "v_proj", "out_proj")
    return [
        Entry(f"{ours}cls", "vision_model.embeddings.class_embedding"),
        Entry(f"{ours}positions", "vision_model.embeddings.position_embedding.weight"),
        *patches(f"{ours}patch_embed", "vision_model.embeddings.patch_embedding", bias=False),
        *norm(f"{ours}input_norm", "vision_model.pre_layrnorm"),
        *attention(f"{block}/attention", f"{name}.self_attn", layers, names),
        *norm(f"{block}/norm1", f"{name}.layer_norm1", layers),
        *norm(f"{block}/norm2", f"{name}.layer_norm2", layers),
        *mlp(f"{block}/mlp", f"{name}.mlp", layers),
    ]


def arguments(_: Settings) -> dict[str, Any]:
    """`ViTConfig`'s arguments that are particular to CLIP."""
    return dict(patch_bias=False, input_norm=True)


# the final norm is applied to the class token only
UNUSED = r"(?!vision_model\.).*|vision_model\.post_layernorm\..*|.*position_ids"
LAYOUT = EncoderLayout(("clip_vision_model", "clip"), table, UNUSED, DEFAULTS, arguments, tower=True)
