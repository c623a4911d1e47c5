"""The pixel decoder: reconstructed features to pixels in one pass, for small images."""

import dataclasses

import jax
from flax import nnx

from unimm_jax.models.keys import Keys
from unimm_jax.models.transformer import Block, Linear, run_stack, stack
from unimm_jax.models.vit import unpatchify


@dataclasses.dataclass(frozen=True)
class PixelDecoderConfig:
    """Shape of the pixel decoder."""

    width: int = 128
    depth: int = 2
    heads: int = 4
    mlp_width: int = 512


class PixelDecoder(nnx.Module):
    """Transformer blocks over the features and a linear head per patch."""

    def __init__(self, config: PixelDecoderConfig, feature_width: int, patch_size: int, *, rngs: Keys):
        c = config
        self.patch_size = patch_size
        self.inner = Linear(feature_width, c.width, axes=(None, "embed"), rngs=rngs)
        self.blocks = stack(lambda r: Block(c.width, c.heads, c.mlp_width, rngs=r, activation="relu2"), c.depth, rngs)
        self.out = Linear(c.width, patch_size * patch_size * 3, axes=("embed", None), rngs=rngs)

    def __call__(self, features_BPD: jax.Array) -> jax.Array:
        """Features [B, P, D] → pixels [B, H, W, 3] in [0, 1]."""
        x = run_stack(self.blocks, self.inner(features_BPD), lambda block, y: block(y))
        return unpatchify(jax.nn.sigmoid(self.out(x)), self.patch_size)
