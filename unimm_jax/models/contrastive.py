"""The contrastive model of the encoder stage: the ViT, a small text tower and a linear pixel head."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from unimm_jax.models.attention import segment_mask
from unimm_jax.models.keys import Keys
from unimm_jax.models.tokenizer.quantizer import l2_normalize
from unimm_jax.models.transformer import Block, LayerNorm, Linear, run_stack, stack, truncated
from unimm_jax.models.vit import ViT, ViTConfig


@dataclasses.dataclass(frozen=True)
class TextTowerConfig:
    """Shape of the text tower, and width of the joint embedding space."""

    width: int = 128
    depth: int = 2
    heads: int = 4
    max_length: int = 32
    joint_width: int = 128


class ContrastiveModel(nnx.Module):
    """Embeds images and captions in one space (CLIP); a linear head predicts pixels from the patch features."""

    def __init__(self, encoder: ViTConfig, text: TextTowerConfig, text_rows: int, *, rngs: Keys):
        t = self.text_config = text
        self.encoder = ViT(encoder, rngs=rngs)
        self.image_head = Linear(encoder.width, t.joint_width, axes=("embed", None), rngs=rngs)
        self.pixel_head = Linear(encoder.width, encoder.patch_size**2 * 3, axes=("embed", None), rngs=rngs)
        self.embed = nnx.Param(truncated(rngs.params(), (text_rows, t.width)), axes=("vocab", "embed"))
        self.positions = nnx.Param(truncated(rngs.params(), (t.max_length, t.width)), axes=(None, "embed"))
        self.blocks = stack(lambda r: Block(t.width, t.heads, 4 * t.width, rngs=r), t.depth, rngs)
        self.norm = LayerNorm(t.width)
        self.text_head = Linear(t.width, t.joint_width, axes=("embed", None), rngs=rngs)
        self.log_scale = nnx.Param(jnp.log(jnp.asarray(14.0)), axes=())

    def image_embedding(self, features_BPD: jax.Array) -> jax.Array:
        """Patch features [B, P, D] → unit vectors float32 [B, J]."""
        return l2_normalize(self.image_head(features_BPD.mean(1)).astype(jnp.float32))

    def text_embedding(self, tokens_BT: jax.Array, valid_BT: jax.Array) -> jax.Array:
        """Caption token ids → unit vectors float32 [B, J].

        Args:
          tokens_BT: int32 ids, padded.
          valid_BT: boolean, False for padding.
        """
        x = self.embed[...][tokens_BT] + self.positions[...][: tokens_BT.shape[1]]
        mask = segment_mask(valid_BT.astype(jnp.int32), valid_BT.astype(jnp.int32), causal=False)
        x = self.norm(run_stack(self.blocks, x, lambda block, y: block(y, mask)))
        weight = valid_BT[..., None].astype(x.dtype)
        pooled = (x * weight).sum(1) / jnp.maximum(weight.sum(1), 1)
        return l2_normalize(self.text_head(pooled).astype(jnp.float32))
