"""BLIP-2's vision model (EVA-CLIP ViT-g/14 with 39 blocks and a final norm), Hugging Face names."""

from typing import Any

from unimm_jax.interop.encoders.base import EncoderLayout
from unimm_jax.interop.layers import mlp, norm, output, patches
from unimm_jax.interop.published import Settings
from unimm_jax.interop.table import Entry

DEFAULTS = dict(
    hidden_size=1408, intermediate_size=6144, num_hidden_layers=39, num_attention_heads=16, image_size=224,
    patch_size=14, hidden_act="gelu", layer_norm_eps=1e-6,
)  # fmt: skip


def table(layers: int, biases: str = "qkv", ours: str = "encoder/") -> list[Entry]:
    """The names of the vision model."""
    block, name = f"{ours}blocks", "vision_model.encoder.layers.{}"
    attention = []
    for index, part in enumerate("qkv"):
        kernel, bias = f"{block}/attention/{part}/kernel", f"{block}/attention/{part}/bias"
        attention.append(Entry(kernel, f"{name}.self_attn.qkv.weight", "heads", layers, part=(index, 3)))
        if biases:
            attention.append(Entry(bias, f"{name}.self_attn.qkv.bias", "heads_bias", layers, part=(index, 3)))
    return [
        Entry(f"{ours}cls", "vision_model.embeddings.class_embedding", "batched2"),
        Entry(f"{ours}positions", "vision_model.embeddings.position_embedding", "batched"),
        *patches(f"{ours}patch_embed", "vision_model.embeddings.patch_embedding"),
        *attention,
        *output(f"{block}/attention/o", f"{name}.self_attn.projection", layers),
        *norm(f"{block}/norm1", f"{name}.layer_norm1", layers),
        *norm(f"{block}/norm2", f"{name}.layer_norm2", layers),
        *mlp(f"{block}/mlp", f"{name}.mlp", layers),
        *norm(f"{ours}norm", "vision_model.post_layernorm"),
    ]


def arguments(p: Settings) -> dict[str, Any]:
    """`ViTConfig`'s arguments that are particular to BLIP-2."""
    return dict(biases="qkv" if p.flag("qkv_bias", True) else "", output_norm="affine")


UNUSED = r"(?!vision_model\.).*|.*position_ids"
LAYOUT = EncoderLayout(("blip_2_vision_model", "blip-2"), table, UNUSED, DEFAULTS, arguments, tower=True)
