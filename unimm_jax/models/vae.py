"""Stable Diffusion's autoencoder between pixels and latents, with the blocks and configuration keys of AutoencoderKL.

Tensors are [B, H, W, C]; pixels are in [-1, 1].
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from unimm_jax.models.attention import attention
from unimm_jax.models.denoiser import Conv, GroupNorm, ResnetBlock
from unimm_jax.models.keys import Keys
from unimm_jax.models.transformer import Attention


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Keys as in the published `vae/config.json`; the defaults are Stable Diffusion 1.5's (SDXL scales by 0.13025)."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215


class MidAttention(nnx.Module):
    """GroupNorm and single-head attention over all positions, with a residual."""

    def __init__(self, channels: int, groups: int, *, rngs: Keys):
        self.group_norm = GroupNorm(channels, groups, eps=1e-6)
        self.attention = Attention(channels, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] → [B, H, W, C]."""
        b, h, w, c = x.shape
        y, a = self.group_norm(x).reshape(b, h * w, c), self.attention
        return x + a.o(attention(a.q(y), a.k(y), a.v(y))).reshape(b, h, w, c)


class Mid(nnx.Module):
    """Residual block, attention, residual block."""

    def __init__(self, channels: int, groups: int, *, rngs: Keys):

        def resnet() -> ResnetBlock:
            return ResnetBlock(channels, channels, 0, groups, rngs=rngs, eps=1e-6)

        self.resnet1, self.mixer, self.resnet2 = resnet(), MidAttention(channels, groups, rngs=rngs), resnet()

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] → [B, H, W, C]."""
        return self.resnet2(self.mixer(self.resnet1(x)))


class Stage(nnx.Module):
    """One resolution: residual blocks and a resampling convolution (or None)."""

    def __init__(self, c_in: int, c_out: int, blocks: int, groups: int, sampler: bool, *, rngs: Keys):
        self.resnets = nnx.List(
            ResnetBlock(c_in if i == 0 else c_out, c_out, 0, groups, rngs=rngs, eps=1e-6) for i in range(blocks)
        )
        self.sampler = Conv(c_out, c_out, rngs=rngs) if sampler else None

    def run(self, x: jax.Array) -> jax.Array:
        """Applies the residual blocks: [B, H, W, C_in] → [B, H, W, C_out]."""
        for resnet in self.resnets:
            x = resnet(x)
        return x


class Encoder(nnx.Module):
    """Maps pixels to mean and log-variance of the latents."""

    def __init__(self, c: VAEConfig, *, rngs: Keys):
        widths, groups = c.block_out_channels, c.norm_num_groups
        self.conv_in = Conv(c.in_channels, widths[0], rngs=rngs)
        inputs = (widths[0], *widths[:-1])
        self.down = nnx.List(
            Stage(i, o, c.layers_per_block, groups, level < len(widths) - 1, rngs=rngs)
            for level, (i, o) in enumerate(zip(inputs, widths, strict=True))
        )
        self.mid = Mid(widths[-1], groups, rngs=rngs)
        self.conv_norm_out = GroupNorm(widths[-1], groups, eps=1e-6)
        self.conv_out = Conv(widths[-1], 2 * c.latent_channels, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, 3] → [B, H/f, W/f, 2·C]; f is 8 with four levels."""
        x = self.conv_in(x)
        for stage in self.down:
            x = stage.run(x)
            if stage.sampler is not None:  # padding at the bottom and right only
                kernel = stage.sampler.kernel[...].astype(x.dtype)
                names = ("NHWC", "HWIO", "NHWC")
                x = jax.lax.conv_general_dilated(x, kernel, (2, 2), ((0, 1), (0, 1)), dimension_numbers=names)
                x = x + stage.sampler.bias[...].astype(x.dtype)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(self.mid(x))))


class Decoder(nnx.Module):
    """Maps latents to pixels."""

    def __init__(self, c: VAEConfig, *, rngs: Keys):
        widths, groups = c.block_out_channels[::-1], c.norm_num_groups
        self.conv_in = Conv(c.latent_channels, widths[0], rngs=rngs)
        self.mid = Mid(widths[0], groups, rngs=rngs)
        inputs = (widths[0], *widths[:-1])
        self.up = nnx.List(
            Stage(i, o, c.layers_per_block + 1, groups, level < len(widths) - 1, rngs=rngs)
            for level, (i, o) in enumerate(zip(inputs, widths, strict=True))
        )
        self.conv_norm_out = GroupNorm(widths[-1], groups, eps=1e-6)
        self.conv_out = Conv(widths[-1], c.out_channels, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, h, w, C] → [B, f·h, f·w, 3]; f is 8 with four levels."""
        x = self.mid(self.conv_in(x))
        for stage in self.up:
            x = stage.run(x)
            if stage.sampler is not None:
                x = stage.sampler(x.repeat(2, 1).repeat(2, 2))
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class VAE(nnx.Module):
    """The autoencoder. The latents of `encode` and `decode` are scaled by `scaling_factor`, as the U-Net expects."""

    def __init__(self, config: VAEConfig, *, rngs: Keys):
        c = self.config = config
        self.encoder, self.decoder = Encoder(c, rngs=rngs), Decoder(c, rngs=rngs)
        self.quant_conv = Conv(2 * c.latent_channels, 2 * c.latent_channels, rngs=rngs, size=1)
        self.post_quant_conv = Conv(c.latent_channels, c.latent_channels, rngs=rngs, size=1)

    def moments(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Pixels [B, H, W, 3] → (mean, log-variance) of the unscaled latents; log-variance is clipped to [-30, 20]."""
        mean, log_variance = jnp.split(self.quant_conv(self.encoder(x)), 2, -1)
        return mean, jnp.clip(log_variance, -30, 20)

    def encode(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Pixels [B, H, W, 3] → scaled latents [B, h, w, C]: a sample, or the mean if `key` is None."""
        mean, log_variance = self.moments(x)
        if key is not None:
            mean = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape, mean.dtype)
        return mean * self.config.scaling_factor

    def decode(self, z: jax.Array) -> jax.Array:
        """Scaled latents [B, h, w, C] → pixels [B, H, W, 3]."""
        return self.decoder(self.post_quant_conv(z / self.config.scaling_factor))
