"""The blocks before and after the quantizer of a bidirectional image tokenizer (ILLUME §3.1).

ILLUME's code was not released. The structure is that of the semantic branch of ILLUME+'s code (`dualvitok_model.py`):
plain transformer blocks on both sides of the quantizer, over all patches. Differences: learned position embeddings in
the decoder instead of two-dimensional RoPE, and no bias of keys, because it has no effect on a softmax.
"""

import jax
from flax import nnx

from unimm_jax.models.keys import Keys
from unimm_jax.models.transformer import Block, LayerNorm, Linear, run_stack, stack


def _blocks(width: int, heads: int, hidden: int, depth: int, rngs: Keys) -> Block:
    """A stack of `depth` blocks."""
    return stack(lambda r: Block(width, heads, hidden, rngs=r, biases="qv"), depth, rngs)


def _run(block: Block, x_BPD: jax.Array) -> jax.Array:
    return block(x_BPD)


class BidirectionalEncoder(nnx.Module):
    """Transformer blocks with full attention over the encoder's features, then a LayerNorm."""

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        depth: int,
        *,
        rngs: Keys,
        scan: bool = True,
        remat: str = "none",
    ):
        self.scan, self.remat = scan, remat
        self.blocks = _blocks(width, heads, hidden, depth, rngs)
        self.norm = LayerNorm(width)

    def __call__(self, x_BPD: jax.Array) -> jax.Array:
        """Features [B, P, D] → [B, P, D], in the same dtype."""
        return self.norm(run_stack(self.blocks, x_BPD, _run, scan=self.scan, remat=self.remat))


class BidirectionalDecoder(nnx.Module):
    """Reconstructs the encoder's features: transformer blocks with full attention over the grid of code embeddings.

    The outputs have mean 0 and variance 1 over the width, as the features that they reconstruct.
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
        scan: bool = True,
        remat: str = "none",
    ):
        self.scan, self.remat = scan, remat
        start = nnx.initializers.truncated_normal(0.3)  # as in `FeatureDecoder`
        self.inner = Linear(code_width, width, axes=(None, "embed"), rngs=rngs, init=start)
        self.positions = nnx.Param(start(rngs.params(), (num_patches, width)), axes=(None, "embed"))
        self.blocks = _blocks(width, heads, hidden, depth, rngs)
        self.norm = LayerNorm(width)
        self.out = Linear(width, width, axes=("mlp", "embed"), rngs=rngs)
        self.output_norm = LayerNorm(width, affine=False)

    def __call__(self, z_BPC: jax.Array) -> jax.Array:
        """Codebook vectors of all patches [B, P, C] → reconstructed features [B, P, D], in the same dtype."""
        x_BPD = self.inner(z_BPC) + self.positions[...].astype(z_BPC.dtype)
        x_BPD = run_stack(self.blocks, x_BPD, _run, scan=self.scan, remat=self.remat)
        return self.output_norm(self.out(self.norm(x_BPD)))
