"""Conditions of a published U-Net: projections of the reconstructed features, in place of a prompt (LaVIT's code)."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from unimm_jax.models.attention import attention
from unimm_jax.models.keys import Keys
from unimm_jax.models.transformer import Attention, Linear, truncated


@dataclasses.dataclass(frozen=True)
class ConditionerConfig:
    """Widths of the U-Net's context and, for SDXL, of its second context and its pooled vector.

    Attributes:
      context: width of the (first) context; 768 in Stable Diffusion 1.5.
      pooled: width of the second context and of the pooled vector; 1280 in SDXL, 0 (none) in Stable Diffusion 1.5.
      heads: heads of the attention pool.
      empty: rows of the stored embedding of an empty prompt, which LaVIT uses as the negative context of Stable
        Diffusion 1.5 (77 rows); with 0 the negative context is zeros, as for SDXL.
    """

    context: int = 768
    pooled: int = 0
    heads: int = 16
    empty: int = 0


class AttentionPool(nnx.Module):
    """CLIP's attention pool: the mean of the patches attends to all patches."""

    def __init__(self, width: int, heads: int, d_out: int, num_patches: int, *, rngs: Keys):
        self.positions = nnx.Param(truncated(rngs.params(), (num_patches + 1, width)), axes=(None, "embed"))
        self.attention = Attention(width, heads, rngs=rngs, d_out=d_out)

    def __call__(self, x_BPD: jax.Array) -> jax.Array:
        """[B, P, D] → [B, d_out]."""
        x_BTD = jnp.concatenate([x_BPD.mean(1, keepdims=True), x_BPD], 1) + self.positions[...].astype(x_BPD.dtype)
        a = self.attention
        return a.o(attention(a.q(x_BTD[:, :1]), a.k(x_BTD), a.v(x_BTD)))[:, 0]


class Conditioner(nnx.Module):
    """Maps reconstructed features [B, P, D] to the U-Net's context and, for SDXL, to a pooled vector."""

    def __init__(self, width: int, num_patches: int, config: ConditionerConfig, *, rngs: Keys):
        c = self.config = config
        if c.pooled:
            self.context1 = Linear(width, c.context, axes=("embed", "mlp"), rngs=rngs)
            self.context2 = Linear(width, c.pooled, axes=("embed", "mlp"), rngs=rngs)
            self.pool = AttentionPool(width, c.heads, c.pooled, num_patches, rngs=rngs)
        else:
            self.context = Linear(width, c.context, axes=("embed", "mlp"), rngs=rngs)
        self.empty = nnx.Param(jnp.zeros((c.empty, c.context)), axes=(None, None)) if c.empty else None

    def __call__(self, x_BPD: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Returns (context [B, P, X], pooled [B, Y] or None). X is the sum of both context widths for SDXL."""
        if not self.config.pooled:
            return self.context(x_BPD), None
        return jnp.concatenate([self.context1(x_BPD), self.context2(x_BPD)], -1), self.pool(x_BPD)

    def negative(self, context_BPX: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The context without an image, for guidance: (context [B, P, X], mask boolean [B, P], True for valid rows).

        The first rows are the stored embedding of the empty prompt (LaVIT's `uncond_embeddings.bin`) and the only valid
        ones. Without a stored embedding all rows are valid zeros.
        """
        zeros = jnp.zeros_like(context_BPX)
        if self.empty is None:
            return zeros, jnp.ones(zeros.shape[:2], bool)
        rows = self.empty.shape[0]
        mask = jnp.broadcast_to(jnp.arange(zeros.shape[1]) < rows, zeros.shape[:2])
        return zeros.at[:, :rows].set(self.empty[...].astype(zeros.dtype)), mask
