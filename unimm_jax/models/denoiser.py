"""The denoising U-Net, with the blocks and configuration keys of Stable Diffusion's U-Net, and DDIM sampling.

Tensors are [B, H, W, C]. `UNetConfig` has the keys of the published `config.json`, so published weights load by name.
The cross-attention context is reconstructed features in place of text.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from unimm_jax.models.attention import attention
from unimm_jax.models.keys import Keys
from unimm_jax.models.partitioning import constrain, weight
from unimm_jax.models.transformer import REMAT, LayerNorm, Linear, OutputProjection


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Keys as in the published `unet/config.json`; the defaults are Stable Diffusion 1.5's.

    As in that file, `attention_head_dim` is the number of heads. It and `transformer_layers_per_block` are one number,
    or one number per level. Block types that contain "CrossAttn" have transformer layers. With `addition_embed_type`
    "text_time" (SDXL), a pooled vector and six sizes, each embedded with width `addition_time_embed_dim`, are added to
    the time embedding.
    """

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    layers_per_block: int = 2
    transformer_layers_per_block: int | tuple[int, ...] = 1
    attention_head_dim: int | tuple[int, ...] = 8
    cross_attention_dim: int = 768
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    addition_embed_type: str = ""
    addition_time_embed_dim: int = 256
    projection_class_embeddings_input_dim: int = 2816

    def level(self, name: str, index: int) -> int:
        """The value at a level of a setting that is one number, or one number per level."""
        value = getattr(self, name)
        return value if isinstance(value, int) else value[index]


class Conv(nnx.Module):
    """Convolution with an odd kernel size and "same" padding; kernel [h, w, in, out]."""

    def __init__(self, c_in: int, c_out: int, *, rngs: Keys, size: int = 3, stride: int = 1, zero: bool = False):
        self.stride = stride
        init = nnx.initializers.zeros if zero else nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(init(rngs.params(), (size, size, c_in, c_out)), axes=(None, None, "embed", "mlp"))
        self.bias = nnx.Param(jnp.zeros((c_out,)), axes=(None,))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C_in] → [B, H', W', C_out]."""
        kernel = weight(self.kernel[...], (None, None, "embed", "mlp"), x.dtype)
        pad = ((kernel.shape[0] // 2,) * 2,) * 2
        y = jax.lax.conv_general_dilated(x, kernel, (self.stride,) * 2, pad, dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return y + self.bias[...].astype(x.dtype)


class GroupNorm(nnx.Module):
    """Group normalization over spatial axes and channel groups, in float32."""

    def __init__(self, channels: int, groups: int, *, eps: float = 1e-5):
        self.groups, self.eps = groups, eps
        self.scale = nnx.Param(jnp.ones((channels,)), axes=(None,))
        self.bias = nnx.Param(jnp.zeros((channels,)), axes=(None,))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, ..., C] → [B, ..., C], same dtype."""
        b, *space, c = x.shape
        y = x.astype(jnp.float32).reshape(b, -1, self.groups, c // self.groups)
        y = y - y.mean((1, 3), keepdims=True)
        y = y * jax.lax.rsqrt((y * y).mean((1, 3), keepdims=True) + self.eps)
        y = y.reshape(b, *space, c) * self.scale[...] + self.bias[...]
        return y.astype(x.dtype)


class ResnetBlock(nnx.Module):
    """Residual block: norm, SiLU, conv; add the time embedding; norm, SiLU, conv; add the (projected) input.

    Args (constructor):
      time: width of the time embedding; 0 is none.
    """

    def __init__(self, c_in: int, c_out: int, time: int, groups: int, *, rngs: Keys, eps: float = 1e-5):
        self.norm1, self.conv1 = GroupNorm(c_in, groups, eps=eps), Conv(c_in, c_out, rngs=rngs)
        self.time_emb_proj = Linear(time, c_out, axes=("embed", "mlp"), rngs=rngs) if time else None
        self.norm2, self.conv2 = GroupNorm(c_out, groups, eps=eps), Conv(c_out, c_out, rngs=rngs)
        self.conv_shortcut = Conv(c_in, c_out, rngs=rngs, size=1) if c_in != c_out else None

    def __call__(self, x: jax.Array, time_BD: jax.Array | None = None) -> jax.Array:
        """[B, H, W, C_in] and time embedding [B, X] → [B, H, W, C_out]."""
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        if self.time_emb_proj is not None and time_BD is not None:
            y = y + self.time_emb_proj(jax.nn.silu(time_BD))[:, None, None]
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        y = y + (x if self.conv_shortcut is None else self.conv_shortcut(x))
        return constrain(y, "batch", None, None, None)


class CrossAttention(nnx.Module):
    """Stable Diffusion's attention: q, k and v have no biases."""

    def __init__(self, width: int, heads: int, context: int, *, rngs: Keys):
        shape, axes = (heads, width // heads), ("embed", "heads", None)
        self.to_q = Linear(width, shape, axes=axes, rngs=rngs, bias=False)
        self.to_k = Linear(context, shape, axes=axes, rngs=rngs, bias=False)
        self.to_v = Linear(context, shape, axes=axes, rngs=rngs, bias=False)
        self.to_out = OutputProjection(heads, width // heads, width, rngs=rngs)

    def __call__(self, x_BTD: jax.Array, context_BSD: jax.Array, mask_BS: jax.Array | None = None) -> jax.Array:
        """[B, T, D] attends to the context [B, S, X] where `mask_BS` (boolean) is True → [B, T, D]."""
        mask = None if mask_BS is None else jnp.broadcast_to(mask_BS[:, None], (*x_BTD.shape[:2], mask_BS.shape[1]))
        return self.to_out(attention(self.to_q(x_BTD), self.to_k(context_BSD), self.to_v(context_BSD), mask))


class SpatialBlock(nnx.Module):
    """Self-attention, cross-attention and GEGLU feed-forward, each with pre-norm and a residual."""

    def __init__(self, width: int, heads: int, context: int, *, rngs: Keys):
        self.norm1, self.norm2, self.norm3 = (LayerNorm(width) for _ in range(3))
        self.attn1 = CrossAttention(width, heads, width, rngs=rngs)
        self.attn2 = CrossAttention(width, heads, context, rngs=rngs)
        self.ff_in = Linear(width, 8 * width, axes=("embed", "mlp"), rngs=rngs)
        self.ff_out = Linear(4 * width, width, axes=("mlp", "embed"), rngs=rngs)

    def __call__(self, x_BTD: jax.Array, context_BSD: jax.Array, mask_BS: jax.Array | None = None) -> jax.Array:
        """Positions [B, T, D] and context [B, S, X] → [B, T, D]."""
        y = self.norm1(x_BTD)
        x_BTD = x_BTD + self.attn1(y, y)
        x_BTD = x_BTD + self.attn2(self.norm2(x_BTD), context_BSD, mask_BS)
        value, gate = jnp.split(self.ff_in(self.norm3(x_BTD)), 2, -1)
        return x_BTD + self.ff_out(value * jax.nn.gelu(gate, approximate=False))


class SpatialTransformer(nnx.Module):
    """GroupNorm, projection in, transformer blocks over all positions, projection out, residual."""

    def __init__(self, channels: int, c: UNetConfig, level: int, *, rngs: Keys):
        heads = c.level("attention_head_dim", level)
        self.norm = GroupNorm(channels, c.norm_num_groups, eps=1e-6)
        self.proj_in = Linear(channels, channels, axes=("embed", "mlp"), rngs=rngs)
        self.blocks = nnx.List(
            SpatialBlock(channels, heads, c.cross_attention_dim, rngs=rngs)
            for _ in range(c.level("transformer_layers_per_block", level))
        )
        self.proj_out = Linear(channels, channels, axes=("mlp", "embed"), rngs=rngs)

    def __call__(self, x: jax.Array, context_BSD: jax.Array, mask_BS: jax.Array | None = None) -> jax.Array:
        """[B, H, W, C] and context [B, S, X] → [B, H, W, C]."""
        b, h, w, ch = x.shape
        y = self.proj_in(self.norm(x).reshape(b, h * w, ch))
        for block in self.blocks:
            y = block(y, context_BSD, mask_BS)
        return x + self.proj_out(y).reshape(b, h, w, ch)


class UNet(nnx.Module):
    """The U-Net: (noisy [B, H, W, C], time steps [B], context [B, S, X]) → predicted noise [B, H, W, C].

    SDXL also needs a pooled vector [B, Y] and sizes [B, 6] in pixels: height and width of the original, top and left
    of the crop, height and width of the target.
    """

    def __init__(self, config: UNetConfig, *, rngs: Keys):
        c = self.config = config
        widths, groups, time = c.block_out_channels, c.norm_num_groups, 4 * c.block_out_channels[0]

        def resnet(c_in: int, c_out: int) -> ResnetBlock:
            return ResnetBlock(c_in, c_out, time, groups, rngs=rngs, eps=c.norm_eps)

        def mixer(channels: int, kind: str, level: int) -> SpatialTransformer | None:
            return SpatialTransformer(channels, c, level, rngs=rngs) if "CrossAttn" in kind else None

        self.time_embedding1 = Linear(widths[0], time, axes=("embed", "mlp"), rngs=rngs)
        self.time_embedding2 = Linear(time, time, axes=("embed", "mlp"), rngs=rngs)
        if c.addition_embed_type:
            d_in = c.projection_class_embeddings_input_dim
            self.add_embedding1 = Linear(d_in, time, axes=("embed", "mlp"), rngs=rngs)
            self.add_embedding2 = Linear(time, time, axes=("embed", "mlp"), rngs=rngs)
        self.conv_in = Conv(c.in_channels, widths[0], rngs=rngs)
        skips, channels = [widths[0]], widths[0]
        down = []
        for level, (width, kind) in enumerate(zip(widths, c.down_block_types, strict=True)):
            resnets, mixers = [], []
            for _ in range(c.layers_per_block):
                resnets.append(resnet(channels, width))
                mixers.append(mixer(width, kind, level))
                channels = width
                skips.append(channels)
            last = level == len(widths) - 1
            sampler = None if last else Conv(channels, channels, rngs=rngs, stride=2)
            if not last:
                skips.append(channels)
            down.append(Level(resnets, mixers, sampler))
        self.down = nnx.List(down)
        self.mid1, self.mid_mixer = resnet(channels, channels), SpatialTransformer(channels, c, -1, rngs=rngs)
        self.mid2 = resnet(channels, channels)
        up = []
        for level, (width, kind) in enumerate(zip(reversed(widths), c.up_block_types, strict=True)):
            resnets, mixers = [], []
            for _ in range(c.layers_per_block + 1):
                resnets.append(resnet(channels + skips.pop(), width))
                mixers.append(mixer(width, kind, len(widths) - 1 - level))
                channels = width
            last = level == len(widths) - 1
            up.append(Level(resnets, mixers, None if last else Conv(channels, channels, rngs=rngs)))
        self.up = nnx.List(up)
        self.conv_norm_out = GroupNorm(widths[0], groups, eps=c.norm_eps)
        self.conv_out = Conv(widths[0], c.out_channels, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        steps_B: jax.Array,
        context_BSD: jax.Array,
        pooled_BD: jax.Array | None = None,
        sizes_BS: jax.Array | None = None,
        mask_BS: jax.Array | None = None,
        remat: str = "none",
    ) -> jax.Array:
        """Predicts the noise, [B, H, W, C] in the dtype of `x`.

        Args:
          x: noisy input [B, H, W, C].
          steps_B: diffusion time steps, 0 to 999.
          context_BSD: context [B, S, X].
          pooled_BD, sizes_BS: SDXL's pooled vector and sizes (see the class), else None.
          mask_BS: boolean, True for valid rows of the context; None is all.
          remat: what residual blocks and transformers recompute in the backward pass, a name of `transformer.REMAT`.

        Raises:
          ValueError: an SDXL U-Net without pooled vector or sizes.
        """
        c, policy = self.config, REMAT[remat]

        def plain(block: Any, *inputs: Any) -> jax.Array:
            return block(*inputs)

        run = plain if policy is None else jax.checkpoint(plain, policy=policy)
        time = self.time_embedding1(sinusoid(steps_B, c.block_out_channels[0]).astype(x.dtype))
        time = self.time_embedding2(jax.nn.silu(time))
        if c.addition_embed_type:
            if pooled_BD is None or sizes_BS is None:
                raise ValueError("a U-Net with addition_embed_type (SDXL) needs pooled_BD and sizes_BS")
            sizes = sinusoid(sizes_BS.reshape(-1), c.addition_time_embed_dim).reshape(sizes_BS.shape[0], -1)
            added = jnp.concatenate([pooled_BD, sizes.astype(pooled_BD.dtype)], -1).astype(x.dtype)
            time = time + self.add_embedding2(jax.nn.silu(self.add_embedding1(added)))
        x = self.conv_in(x)
        skips = [x]
        for level in self.down:
            for resnet, mixer in zip(level.resnets, level.mixers, strict=True):
                x = run(resnet, x, time)
                x = x if mixer is None else run(mixer, x, context_BSD, mask_BS)
                skips.append(x)
            if level.sampler is not None:
                x = level.sampler(x)
                skips.append(x)
        x = run(self.mid2, run(self.mid_mixer, run(self.mid1, x, time), context_BSD, mask_BS), time)
        for level in self.up:
            for resnet, mixer in zip(level.resnets, level.mixers, strict=True):
                x = run(resnet, jnp.concatenate([x, skips.pop()], -1), time)
                x = x if mixer is None else run(mixer, x, context_BSD, mask_BS)
            if level.sampler is not None:
                x = level.sampler(x.repeat(2, 1).repeat(2, 2))
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class Level(nnx.Module):
    """One resolution: residual blocks, their transformers (or None), and a resampling convolution (or None)."""

    def __init__(self, resnets: list, mixers: list, sampler: Conv | None):
        self.resnets, self.mixers, self.sampler = nnx.List(resnets), nnx.List(mixers), sampler


def sinusoid(steps_B: jax.Array, width: int) -> jax.Array:
    """Sinusoidal time embedding, cosines first as in Stable Diffusion: float32 [B, width]."""
    half = width // 2
    angle = steps_B.astype(jnp.float32)[:, None] * jnp.exp(-np.log(10000.0) * jnp.arange(half) / half)
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1)


@functools.lru_cache(maxsize=4)
def alphas(steps: int = 1000, start: float = 0.00085, end: float = 0.012) -> np.ndarray:
    """Cumulative products of 1 - beta, float32 [steps]; beta has the "scaled linear" schedule from `start` to `end`."""
    beta = np.linspace(start**0.5, end**0.5, steps, dtype=np.float64) ** 2
    return np.cumprod(1 - beta).astype(np.float32)


def add_noise(x: jax.Array, noise: jax.Array, steps_B: jax.Array) -> jax.Array:
    """Forward diffusion: noises `x` [B, H, W, C] with `noise` (same shape) to time steps `steps_B`."""
    a = jnp.asarray(alphas())[steps_B][:, None, None, None]
    return jnp.sqrt(a) * x + jnp.sqrt(1 - a) * noise


def ddim(
    predict: Callable[[jax.Array, jax.Array], jax.Array], noise: jax.Array, steps: int, clip: float | None = None
) -> jax.Array:
    """DDIM sampling with eta 0, "leading" spacing and offset 1 (Stable Diffusion's scheduler configuration).

    Args:
      predict: (x, time steps [B]) → noise, guidance included.
      noise: initial noise [B, H, W, C].
      steps: number of evaluations of `predict`.
      clip: bound of the predicted clean signal, for pixel space; None does not clip (as published).

    Returns:
      the clean signal [B, H, W, C].
    """
    table = np.concatenate([alphas()[:1], alphas()])  # index 0 is before the first step (set_alpha_to_one=False)
    times = np.arange(steps)[::-1] * (1000 // steps) + 1
    previous = np.maximum(times - 1000 // steps, -1)
    a, b = jnp.asarray(table[np.minimum(times, 999) + 1]), jnp.asarray(table[previous + 1])

    def step(x: jax.Array, t_a_b: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        t, a, b = t_a_b
        eps = predict(x, jnp.full((x.shape[0],), t))
        clean = (x - jnp.sqrt(1 - a) * eps) / jnp.sqrt(a)
        if clip is not None:
            clean = jnp.clip(clean, -clip, clip)
            eps = (x - jnp.sqrt(a) * clean) / jnp.sqrt(1 - a)
        return jnp.sqrt(b) * clean + jnp.sqrt(1 - b) * eps, None

    return jax.lax.scan(step, noise, (jnp.asarray(np.minimum(times, 999)), a, b))[0]


def pixel_unshuffle(images: jax.Array, factor: int) -> jax.Array:
    """[B, H, W, C] → [B, H/f, W/f, C·f·f] with f = `factor`."""
    b, h, w, c = images.shape
    x = images.reshape(b, h // factor, factor, w // factor, factor, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h // factor, w // factor, factor * factor * c)


def pixel_shuffle(x: jax.Array, factor: int) -> jax.Array:
    """The inverse of `pixel_unshuffle`: [B, h, w, C·f·f] → [B, h·f, w·f, C]."""
    b, h, w, d = x.shape
    c = d // (factor * factor)
    return x.reshape(b, h, w, factor, factor, c).transpose(0, 1, 3, 2, 4, 5).reshape(b, h * factor, w * factor, c)
