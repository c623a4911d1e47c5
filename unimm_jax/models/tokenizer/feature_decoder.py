"""The feature decoder: reconstructs the encoder's features from codes (LaVIT §3.1, x_rec in Eq. 4)."""

import jax
import jax.numpy as jnp
from flax import nnx

from unimm_jax.models.keys import Keys
from unimm_jax.models.transformer import Attention, LayerNorm, Linear, Mlp, run_stack, stack


class DecoderBlock(nnx.Module):
    """Self-attention of the queries, cross-attention to the code embeddings, feed-forward."""

    def __init__(self, width: int, heads: int, hidden: int, *, rngs: Keys):
        self.norm0, self.norm1, self.norm2 = (LayerNorm(width) for _ in range(3))
        self.attention = Attention(width, heads, rngs=rngs)
        self.cross = Attention(width, heads, rngs=rngs)
        self.mlp = Mlp(width, hidden, rngs=rngs)

    def __call__(self, q_BPD: jax.Array, codes_BSD: jax.Array, valid_BPS: jax.Array, sink: float) -> jax.Array:
        """Queries [B, P, D], code embeddings [B, S, D], valid float [B, P, S] → [B, P, D]."""
        q_BPD = q_BPD + self.attention(self.norm0(q_BPD))
        y = self.norm1(q_BPD)
        if sink:
            q_BPD = q_BPD + self.cross.with_policy(y, codes_BSD, valid_BPS, 0.0, sink)
        else:
            q_BPD = q_BPD + self.cross(y, codes_BSD, valid_BPS > 0.5)
        return q_BPD + self.mlp(self.norm2(q_BPD))


class FeatureDecoder(nnx.Module):
    """One learned query per patch attends to the code embeddings; the outputs are the reconstructed features.

    Args (constructor):
      sink: sink of the cross-attention (`policy_attention`), which passes a gradient to the mask; 0 is LaVIT's plain
        masked softmax, which passes none.
    """

    def __init__(
        self,
        code_width: int,
        width: int,
        heads: int,
        hidden: int,
        depth: int,
        num_patches: int,
        *,
        rngs: Keys,
        sink: float = 0.0,
        scan: bool = True,
        remat: str = "none",
    ):
        self.sink, self.scan, self.remat = sink, scan, remat
        # A larger initial scale than elsewhere, so that attention can distinguish patches from the start.
        start = nnx.initializers.truncated_normal(0.3)
        self.inner = Linear(code_width, width, axes=(None, "embed"), rngs=rngs, init=start)
        self.positions = nnx.Param(start(rngs.params(), (num_patches, width)), axes=(None, "embed"))
        self.queries = nnx.Param(start(rngs.params(), (num_patches, width)), axes=(None, "embed"))
        self.blocks = stack(lambda r: DecoderBlock(width, heads, hidden, rngs=r), depth, rngs)
        self.norm = LayerNorm(width)
        self.out1 = Linear(width, width, axes=("embed", "mlp"), rngs=rngs)
        self.out2 = Linear(width, width, axes=("mlp", "embed"), rngs=rngs)

    def __call__(self, z_BSC: jax.Array, index_BS: jax.Array, valid_BS: jax.Array) -> jax.Array:
        """Codebook vectors → reconstructed features [B, P, D].

        Args:
          z_BSC: codebook vectors of the tokens.
          index_BS: int32, position embedding of each token: its index among the kept tokens (LaVIT) or its patch.
          valid_BS: float, 1 for valid tokens; may carry a gradient.
        """
        x_BSD = self.inner(z_BSC) + self.positions[...].astype(z_BSC.dtype)[index_BS]
        queries = self.queries[...].astype(z_BSC.dtype)
        q_BPD = jnp.broadcast_to(queries, (z_BSC.shape[0], *queries.shape))
        valid_BPS = jnp.broadcast_to(valid_BS[:, None], (z_BSC.shape[0], queries.shape[0], z_BSC.shape[1]))

        def step(block: DecoderBlock, q: jax.Array) -> jax.Array:
            return block(q, x_BSD, valid_BPS, self.sink)

        q_BPD = self.norm(run_stack(self.blocks, q_BPD, step, scan=self.scan, remat=self.remat))
        return self.out2(jnp.tanh(self.out1(q_BPD)))
