"""The vision transformer: one class for EVA-CLIP ViT-g/14 (LaVIT's encoder) and for the small one of `laptop`."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from unimm_jax.models.transformer import Block, LayerNorm, Linear, run_stack, stack, truncated


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Shape of a ViT. The defaults are EVA-CLIP ViT-g/14 as LaVIT uses it (spec: LaVIT code, 40 blocks of 1408).

    Attributes:
      heads: divides `width`.
      biases: which of q, k, v carry a bias.
      output_norm: "none" returns the last block's output as LaVIT does; "plain" adds a LayerNorm without parameters
        (what ILLUME+ takes as target); "affine" a learned one.
      class_token: a learned token before the patches (all but SigLIP).
      patch_bias, input_norm: bias of the patch embedding, LayerNorm before the blocks (CLIP: without, with).
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
    scan: bool = True
    remat: str = "none"

    @property
    def patches(self) -> int:
        """Number of patches a picture."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def flops(self) -> float:
        """Operations of one picture's forward pass: 2 for each weight and position, 4 T D for each position's
        attention."""
        t, d = self.patches + self.class_token, self.width
        block = 2 * (4 * d * d + 2 * d * self.mlp_width) + 4 * t * d
        return self.depth * t * block + 2 * self.patches * 3 * self.patch_size**2 * d


class ViT(nnx.Module):
    """Patches, a class token, learned absolute positions, pre-norm blocks."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        patch = c.patch_size * c.patch_size * 3
        self.patch_embed = Linear(patch, c.width, axes=(None, "embed"), rngs=rngs, bias=c.patch_bias)
        self.cls = nnx.Param(truncated(rngs.params(), (c.width,)), axes=(None,)) if c.class_token else None
        tokens = c.patches + c.class_token
        self.positions = nnx.Param(truncated(rngs.params(), (tokens, c.width)), axes=(None, "embed"))
        self.input_norm = LayerNorm(c.width, eps=c.eps) if c.input_norm else None
        make = lambda r: Block(
            c.width, c.heads, c.mlp_width, rngs=r, eps=c.eps, biases=c.biases, activation=c.activation
        )
        self.blocks = stack(make, c.depth, rngs)
        self.norm = LayerNorm(c.width, eps=c.eps, affine=c.output_norm == "affine")

    def __call__(self, images_BHWC: jax.Array) -> jax.Array:
        """Normalised pixels [B, H, W, 3] → patch features [B, P, D] in raster order, without the class token."""
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


def patchify(images_BHWC: jax.Array, size: int) -> jax.Array:
    """[B, H, W, C] → [B, P, size·size·C], patches in raster order, each flattened row by row."""
    b, h, w, c = images_BHWC.shape
    x = images_BHWC.reshape(b, h // size, size, w // size, size, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, (h // size) * (w // size), size * size * c)


def unpatchify(patches_BPD: jax.Array, size: int) -> jax.Array:
    """The inverse of `patchify` for square pictures."""
    b, p, d = patches_BPD.shape
    side, channels = round(p**0.5), d // (size * size)
    x = patches_BPD.reshape(b, side, side, size, size, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, side * size, side * size, channels)


# CLIP's pixel statistics, in the [0, 1] range (LaVIT §1.1 preprocessing).
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


def normalize_pixels(images_uint8: jax.Array, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """uint8 RGB [..., 3] → CLIP-normalised floats."""
    x = images_uint8.astype(jnp.float32) / 255
    return ((x - jnp.asarray(PIXEL_MEAN)) / jnp.asarray(PIXEL_STD)).astype(dtype)
