"""The vision transformer: EVA-CLIP ViT-g/14 (LaVIT's encoder), CLIP, SigLIP and smaller ones."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
from flax import nnx

from unimm_jax.models.keys import Keys
from unimm_jax.models.transformer import Block, LayerNorm, Linear, run_stack, stack, truncated

# CLIP's pixel mean and standard deviation for pixels in [0, 1] (LaVIT's preprocessing).
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Shape of a ViT. The defaults are EVA-CLIP ViT-g/14 as in LaVIT's code (40 blocks of width 1408).

    Attributes:
      image_size, patch_size: sides in pixels.
      heads: divides `width`.
      biases: which of q, k, v have a bias.
      activation: a name of `transformer.ACTIVATIONS`.
      output_norm: "none" returns the last block's output (LaVIT); "plain" adds a LayerNorm without parameters (the
        target of ILLUME+); "affine" adds one with parameters.
      class_token: prepend a learned token to the patches (all but SigLIP).
      patch_bias: bias of the patch embedding (False in CLIP).
      input_norm: LayerNorm before the blocks (True in CLIP).
      pixel_mean, pixel_std: statistics that normalize pixels in [0, 1] (CLIP's; 0.5 each in SigLIP).
      scan: scan over the blocks, so that only one is compiled.
      remat: what is recomputed in the backward pass, a name of `transformer.REMAT`.
    """

    image_size: int = 224
    patch_size: int = 14
    width: int = 1408
    depth: int = 40
    heads: int = 16
    mlp_width: int = 6144
    biases: str = "qv"
    activation: str = "gelu"
    eps: float = 1e-6
    output_norm: str = "none"
    class_token: bool = True
    patch_bias: bool = True
    input_norm: bool = False
    pixel_mean: tuple[float, ...] = PIXEL_MEAN
    pixel_std: tuple[float, ...] = PIXEL_STD
    scan: bool = True
    remat: str = "none"

    @property
    def num_patches(self) -> int:
        """Number of patches per image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def flops(self) -> float:
        """Floating-point operations per image of the forward pass: per position 2 per weight, 4 T D for attention."""
        t, d = self.num_patches + self.class_token, self.width
        block = 2 * (4 * d * d + 2 * d * self.mlp_width) + 4 * t * d
        return self.depth * t * block + 2 * self.num_patches * 3 * self.patch_size**2 * d


class ViT(nnx.Module):
    """ViT with an optional class token, learned absolute position embeddings and pre-norm blocks."""

    def __init__(self, config: ViTConfig, *, rngs: Keys):
        c = self.config = config
        patch = c.patch_size * c.patch_size * 3
        self.patch_embed = Linear(patch, c.width, axes=(None, "embed"), rngs=rngs, bias=c.patch_bias)
        self.cls = nnx.Param(truncated(rngs.params(), (c.width,)), axes=(None,)) if c.class_token else None
        tokens = c.num_patches + c.class_token
        self.positions = nnx.Param(truncated(rngs.params(), (tokens, c.width)), axes=(None, "embed"))
        self.input_norm = LayerNorm(c.width, eps=c.eps) if c.input_norm else None

        def make(r: Keys) -> Block:
            return Block(c.width, c.heads, c.mlp_width, rngs=r, eps=c.eps, biases=c.biases, activation=c.activation)

        self.blocks = stack(make, c.depth, rngs)
        self.norm = LayerNorm(c.width, eps=c.eps, affine=c.output_norm == "affine")

    def normalize(self, images_uint8: jax.Array, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
        """uint8 RGB [..., 3] → [..., 3] in `dtype`, normalized with the config's mean and standard deviation."""
        x = images_uint8.astype(jnp.float32) / 255
        mean, std = jnp.asarray(self.config.pixel_mean), jnp.asarray(self.config.pixel_std)
        return ((x - mean) / std).astype(dtype)

    def __call__(self, images_BHWC: jax.Array) -> jax.Array:
        """Normalized pixels [B, H, W, 3] → patch features [B, P, D] in raster order; the class token is dropped."""
        c = self.config
        x_BTD = self.patch_embed(patchify(images_BHWC, c.patch_size))
        if self.cls is not None:
            cls = jnp.broadcast_to(self.cls[...].astype(x_BTD.dtype), (x_BTD.shape[0], 1, c.width))
            x_BTD = jnp.concatenate([cls, x_BTD], 1)
        x_BTD = x_BTD + self.positions[...].astype(x_BTD.dtype)
        x_BTD = x_BTD if self.input_norm is None else self.input_norm(x_BTD)
        x_BTD = run_stack(self.blocks, x_BTD, lambda block, x: block(x), scan=c.scan, remat=c.remat)
        x_BPD = x_BTD[:, 1:] if c.class_token else x_BTD
        return x_BPD if c.output_norm == "none" else self.norm(x_BPD)


def can_resize(path: str, have: tuple[int, ...], want: tuple[int, ...]) -> bool:
    """Whether a parameter is a table of positions [T, D] that `resize_positions` brings to another image size."""
    is_table = re.search(r"(^|/)encoder/positions$", path) is not None
    fits = len(have) == len(want) == 2 and have[1] == want[1]
    return is_table and fits and _class_rows(have[0]) is not None and _class_rows(have[0]) == _class_rows(want[0])


def _class_rows(rows: int) -> int | None:
    """How many rows of a table of positions are not patches: 0 or 1; None if the others are no square."""
    return next((n for n in (0, 1) if math.isqrt(rows - n) ** 2 == rows - n), None)


def resize_positions(table_TD: jax.Array, rows: int) -> jax.Array:
    """Position embeddings for another number of patches: [T, D] → [rows, D].

    The grid of patches is resized by cubic interpolation; the row of the class token stays.
    """
    extra = _class_rows(rows) or 0
    have, want = math.isqrt(len(table_TD) - extra), math.isqrt(rows - extra)
    grid = table_TD[extra:].reshape(have, have, -1)
    resized = jax.image.resize(grid, (want, want, grid.shape[-1]), "cubic", antialias=False)
    return jnp.concatenate([table_TD[:extra], resized.reshape(want * want, -1)])


def patchify(images_BHWC: jax.Array, size: int) -> jax.Array:
    """[B, H, W, C] → [B, P, size·size·C]: patches in raster order, each flattened in raster order."""
    b, h, w, c = images_BHWC.shape
    x = images_BHWC.reshape(b, h // size, size, w // size, size, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, (h // size) * (w // size), size * size * c)


def unpatchify(patches_BPD: jax.Array, size: int) -> jax.Array:
    """The inverse of `patchify` for square images: [B, P, size·size·C] → [B, H, W, C]."""
    b, p, d = patches_BPD.shape
    side, channels = round(p**0.5), d // (size * size)
    x = patches_BPD.reshape(b, side, side, size, size, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, side * size, side * size, channels)
