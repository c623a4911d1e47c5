"""What a published U-Net reads in place of a prompt: projections of the reconstructed features (LaVIT code, §3)."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from unimm_jax.models.attention import attention
from unimm_jax.models.transformer import Attention, Linear, truncated


@dataclasses.dataclass(frozen=True)
class ConditionerConfig:
    """Widths of the U-Net's context and, for SDXL, of its second context and of the pooled vector.

    Attributes:
      context: width of the (first) context; Stable Diffusion 1.5 has 768.
      pooled: width of SDXL's second context and of its pooled vector, 1280; 0 is Stable Diffusion 1.5.
      heads: of the attention pool.
      empty: rows of the stored embedding of an empty prompt, LaVIT's negative for Stable Diffusion 1.5 (77 there); with
        0 the negative is zeros, as for SDXL.
    """

    context: int = 768
    pooled: int = 0
    heads: int = 16
    empty: int = 0


class AttentionPool(nnx.Module):
    """CLIP's attention pool: the mean reads every patch through multi-head attention."""

    def __init__(self, width: int, heads: int, d_out: int, patches: int, *, rngs: nnx.Rngs):
        self.positions = nnx.Param(truncated(rngs.params(), (patches + 1, width)), axes=(None, "embed"))
        self.attention = Attention(width, heads, rngs=rngs, d_out=d_out)

    def __call__(self, x_BPD: jax.Array) -> jax.Array:
        """[B, P, D] → [B, d_out]."""
        x_BTD = jnp.concatenate([x_BPD.mean(1, keepdims=True), x_BPD], 1) + self.positions[...].astype(x_BPD.dtype)
        a = self.attention
        return a.o(attention(a.q(x_BTD[:, :1]), a.k(x_BTD), a.v(x_BTD)))[:, 0]


class Conditioner(nnx.Module):
    """Reconstructed features [B, P, D] → the U-Net's context, and a pooled vector for SDXL."""

    def __init__(self, width: int, patches: int, config: ConditionerConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        if c.pooled:
            self.context1 = Linear(width, c.context, axes=("embed", "mlp"), rngs=rngs)
            self.context2 = Linear(width, c.pooled, axes=("embed", "mlp"), rngs=rngs)
            self.pool = AttentionPool(width, c.heads, c.pooled, patches, rngs=rngs)
        else:
            self.context = Linear(width, c.context, axes=("embed", "mlp"), rngs=rngs)
        self.empty = nnx.Param(jnp.zeros((c.empty, c.context)), axes=(None, None)) if c.empty else None

    def __call__(self, x_BPD: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """(context [B, P, X], pooled [B, Y] or None)."""
        if not self.config.pooled:
            return self.context(x_BPD), None
        return jnp.concatenate([self.context1(x_BPD), self.context2(x_BPD)], -1), self.pool(x_BPD)

    def negative(self, context_BPX: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(context without a picture [B, P, X], which rows of it may be read, boolean [B, P]).

        The stored empty prompt stands first and is all that is read (LaVIT's `uncond_embeddings.bin`), or all is zeros.
        """
        zeros = jnp.zeros_like(context_BPX)
        if self.empty is None:
            return zeros, jnp.ones(zeros.shape[:2], bool)
        rows = self.empty.shape[0]
        mask = jnp.broadcast_to(jnp.arange(zeros.shape[1]) < rows, zeros.shape[:2])
        return zeros.at[:, :rows].set(self.empty[...].astype(zeros.dtype)), mask
