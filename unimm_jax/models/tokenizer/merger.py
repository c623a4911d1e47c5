"""The token merger: kept tokens attend to the dropped ones (LaVIT §3.1). Computes all patches or kept ones only."""

import jax
import jax.numpy as jnp
from flax import nnx

from unimm_jax.models.keys import Keys
from unimm_jax.models.partitioning import constrain
from unimm_jax.models.transformer import Attention, LayerNorm, Mlp, run_stack, stack


class MergerBlock(nnx.Module):
    """Causal self-attention of the kept tokens, cross-attention to the dropped ones, feed-forward."""

    def __init__(self, width: int, heads: int, hidden: int, *, rngs: Keys):
        self.norm0, self.norm1, self.norm2 = (LayerNorm(width) for _ in range(3))
        self.causal = Attention(width, heads, rngs=rngs)
        self.cross = Attention(width, heads, rngs=rngs)
        self.mlp = Mlp(width, hidden, rngs=rngs)

    def __call__(
        self,
        x_BTD: jax.Array,
        source_BPD: jax.Array,
        allowed_BTT: jax.Array,
        allowed_BTP: jax.Array,
        eps: float,
        sink: float,
    ) -> jax.Array:
        """Tokens [B, T, D], normalized features [B, P, D], float masks [B, T, T] and [B, T, P] → [B, T, D]."""
        y = self.norm0(x_BTD)
        x_BTD = x_BTD + self.causal.with_policy(y, y, allowed_BTT, eps, sink)
        x_BTD = x_BTD + self.cross.with_policy(self.norm1(x_BTD), source_BPD, allowed_BTP, eps, sink)
        return constrain(x_BTD + self.mlp(self.norm2(x_BTD)), "batch", None, None)


class Merger(nnx.Module):
    """LaVIT's token merger.

    Args (constructor):
      eps, sink: of the policy softmax (`policy_attention`); 1e-6 and 0 in LaVIT. With eps = 0 and a sink, `dense` and
        `kept` agree up to rounding; with eps > 0 they differ by the weight of masked keys.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        depth: int,
        *,
        rngs: Keys,
        eps: float = 1e-6,
        sink: float = 0.0,
        scan: bool = True,
        remat: str = "none",
    ):
        self.eps, self.sink, self.scan, self.remat = eps, sink, scan, remat
        self.source_norm = LayerNorm(width)
        self.blocks = stack(lambda r: MergerBlock(width, heads, hidden, rngs=r), depth, rngs)
        self.norm = LayerNorm(width)

    def dense(self, x_BPD: jax.Array, keep_BP: jax.Array) -> jax.Array:
        """Computes all patches: [B, P, D], valid where kept.

        Args:
          keep_BP: float, 1 for kept patches; may carry a gradient.
        """
        keep_BP = keep_BP.astype(jnp.float32)
        size = x_BPD.shape[1]
        eye, lower = jnp.eye(size), jnp.tril(jnp.ones((size, size)))
        allowed_BTT = (keep_BP[:, None] + (1 - keep_BP[:, None]) * eye) * lower
        allowed_BTP = jnp.broadcast_to(1 - keep_BP[:, None], allowed_BTT.shape)
        return self._run(x_BPD, x_BPD, allowed_BTT, allowed_BTP)

    def kept(self, x_BPD: jax.Array, keep_BP: jax.Array, max_image_tokens: int) -> jax.Array:
        """Computes kept patches only: [B, S, D] in raster order; rows beyond the number of kept patches are invalid.

        Args:
          keep_BP: boolean.
          max_image_tokens: S, static; kept patches beyond it are dropped.
        """
        index_BS, valid_BS = compact(keep_BP, max_image_tokens)
        rows_BSD = jnp.take_along_axis(x_BPD, index_BS[..., None], 1)
        kept = jnp.take_along_axis(keep_BP, index_BS, 1) & valid_BS
        steps = jnp.tril(jnp.ones((max_image_tokens, max_image_tokens), bool))
        allowed_BSS = ((kept[:, None] | jnp.eye(max_image_tokens, dtype=bool)) & steps).astype(jnp.float32)
        allowed_BSP = jnp.broadcast_to(~keep_BP[:, None], (*valid_BS.shape, keep_BP.shape[1])).astype(jnp.float32)
        return self._run(rows_BSD, x_BPD, allowed_BSS, allowed_BSP)

    def _run(
        self, x_BTD: jax.Array, features_BPD: jax.Array, allowed_BTT: jax.Array, allowed_BTP: jax.Array
    ) -> jax.Array:
        source_BPD = self.source_norm(features_BPD)

        def step(block: MergerBlock, x: jax.Array) -> jax.Array:
            return block(x, source_BPD, allowed_BTT, allowed_BTP, self.eps, self.sink)

        return self.norm(run_stack(self.blocks, x_BTD, step, scan=self.scan, remat=self.remat))


def compact(keep_BP: jax.Array, max_image_tokens: int) -> tuple[jax.Array, jax.Array]:
    """Patch indices of the kept patches in raster order: (indices int32 [B, S], valid boolean [B, S])."""
    order_BP = jnp.argsort(~keep_BP, -1, stable=True)
    valid_BS = jnp.arange(max_image_tokens)[None] < keep_BP.sum(-1, keepdims=True)
    return order_BP[:, :max_image_tokens].astype(jnp.int32), valid_BS
