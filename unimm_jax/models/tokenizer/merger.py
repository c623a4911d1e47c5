"""The merger: kept tokens read the dropped ones (LaVIT §3.1), rendered densely or on kept rows only."""

import jax
import jax.numpy as jnp
from flax import nnx

from unimm_jax.models.layout import constrain
from unimm_jax.models.transformer import Attention, LayerNorm, Mlp, run_stack, stack


class MergerBlock(nnx.Module):
    """Causal self-attention among kept tokens, cross-attention to the dropped ones, feed-forward."""

    def __init__(self, width: int, heads: int, hidden: int, *, rngs: nnx.Rngs):
        self.norm0, self.norm1, self.norm2 = (LayerNorm(width) for _ in range(3))
        self.causal = Attention(width, heads, rngs=rngs)
        self.cross = Attention(width, heads, rngs=rngs)
        self.mlp = Mlp(width, hidden, rngs=rngs)

    def __call__(self, x_BTD, source_BPD, allowed_BTT, allowed_BTP, eps: float, sink: float):
        """Rows [B, T, D], normalised features [B, P, D], float masks [B, T, T] and [B, T, P] → [B, T, D]."""
        y = self.norm0(x_BTD)
        x_BTD = x_BTD + self.causal.with_policy(y, y, allowed_BTT, eps, sink)
        x_BTD = x_BTD + self.cross.with_policy(self.norm1(x_BTD), source_BPD, allowed_BTP, eps, sink)
        return constrain(x_BTD + self.mlp(self.norm2(x_BTD)), "batch", None, None)


class Merger(nnx.Module):
    """LaVIT's token merger.

    Args (constructor):
      eps, sink: of the policy softmax (`policy_attention`). LaVIT: 1e-6 and 0. With a sink the dense and the kept-rows
        rendering agree to rounding; with eps they differ by its leak.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        depth: int,
        *,
        rngs: nnx.Rngs,
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
        """All positions: [B, P, D]. `keep_BP` is float and may carry a gradient; rows with 0 mean nothing."""
        keep_BP = keep_BP.astype(jnp.float32)
        size = x_BPD.shape[1]
        eye, lower = jnp.eye(size), jnp.tril(jnp.ones((size, size)))
        allowed_BTT = (keep_BP[:, None] + (1 - keep_BP[:, None]) * eye) * lower
        allowed_BTP = jnp.broadcast_to(1 - keep_BP[:, None], allowed_BTT.shape)
        return self._run(x_BPD, x_BPD, allowed_BTT, allowed_BTP)

    def kept(self, x_BPD: jax.Array, keep_BP: jax.Array, budget: int) -> jax.Array:
        """Kept rows only, in raster order, on a static budget: [B, S, D]; rows past the count are meaningless.

        Args:
          keep_BP: boolean [B, P].
          budget: S; kept tokens beyond it are cut.
        """
        index_BS, valid_BS = compact(keep_BP, budget)
        rows_BSD = jnp.take_along_axis(x_BPD, index_BS[..., None], 1)
        kept = jnp.take_along_axis(keep_BP, index_BS, 1) & valid_BS
        steps = jnp.tril(jnp.ones((budget, budget), bool))
        allowed_BSS = ((kept[:, None] | jnp.eye(budget, dtype=bool)) & steps).astype(jnp.float32)
        allowed_BSP = jnp.broadcast_to(~keep_BP[:, None], (*valid_BS.shape, keep_BP.shape[1])).astype(jnp.float32)
        return self._run(rows_BSD, x_BPD, allowed_BSS, allowed_BSP)

    def _run(self, x_BTD, features_BPD, allowed_BTT, allowed_BTP):
        source_BPD = self.source_norm(features_BPD)
        step = lambda block, x: block(x, source_BPD, allowed_BTT, allowed_BTP, self.eps, self.sink)
        return self.norm(run_stack(self.blocks, x_BTD, step, scan=self.scan, remat=self.remat))


def compact(keep_BP: jax.Array, budget: int) -> tuple[jax.Array, jax.Array]:
    """Patch indices of the kept tokens in raster order: (int32 [B, S], valid boolean [B, S])."""
    order_BP = jnp.argsort(~keep_BP, -1, stable=True)
    valid_BS = jnp.arange(budget)[None] < keep_BP.sum(-1, keepdims=True)
    return order_BP[:, :budget].astype(jnp.int32), valid_BS
