"""SigLIP's vision model, Hugging Face names. Pixels are normalized with mean and standard deviation 0.5."""

from typing import Any

from unimm_jax.interop.encoders.base import HALF_PIXELS, EncoderLayout
from unimm_jax.interop.layers import attention, mlp, norm, patches
from unimm_jax.interop.published import Settings
from unimm_jax.interop.table import Entry

DEFAULTS = dict(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=224,
    patch_size=16, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6,
)  # fmt: skip


def table(layers: int, biases: str = "qkv", ours: str = "encoder/") -> list[Entry]:
    """The names of the vision model."""
    del biases  # always all three
    block, name = f"{ours}blocks", "vision_model.encoder.layers.{}"
    names = ("q_proj", "k_proj", "v_proj", "out_proj")
    return [
        Entry(f"{ours}positions", "vision_model.embeddings.position_embedding.weight"),
        *patches(f"{ours}patch_embed", "vision_model.embeddings.patch_embedding"),
        *attention(f"{block}/attention", f"{name}.self_attn", layers, names),
        *norm(f"{block}/norm1", f"{name}.layer_norm1", layers),
        *norm(f"{block}/norm2", f"{name}.layer_norm2", layers),
        *mlp(f"{block}/mlp", f"{name}.mlp", layers),
        *norm(f"{ours}norm", "vision_model.post_layernorm"),
    ]


def arguments(_: Settings) -> dict[str, Any]:
    """`ViTConfig`'s arguments that are particular to SigLIP."""
    return dict(class_token=False, output_norm="affine")


UNUSED = r"(?!vision_model\.).*|vision_model\.head\..*|.*position_ids"  # the head pools patches
LAYOUT = EncoderLayout(
    ("siglip_vision_model", "siglip"), table, UNUSED, DEFAULTS, arguments, pixels=HALF_PIXELS, tower=True
)
