"""The denoising U-Net of an exported model in PyTorch, [B, C, H, W], and what conditions a U-Net of latents.

`modeling_unimm.py` opens the whole model. Parameters have the names of unimm_jax's tree.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .image_tokenizer_unimm import Attention, feature_decoder


class Resnet(nn.Module):
    """Norm, SiLU, conv twice, time added between, residual."""

    def __init__(self, c_in: int, c_out: int, time: int, groups: int, eps: float):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, c_in, eps), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(time, c_out)
        self.norm2, self.conv2 = nn.GroupNorm(groups, c_out, eps), nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.conv_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """[B, C_in, H, W] → [B, C_out, H, W]."""
        y = self.conv1(F.silu(self.norm1(x))) + self.time_emb_proj(F.silu(time))[:, :, None, None]
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class CrossAttention(nn.Module):
    """Stable Diffusion's attention."""

    def __init__(self, width: int, heads: int, context: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k, self.to_v = (nn.Linear(context, width, bias=False) for _ in range(2))
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """[B, T, D] reads [B, S, X]."""
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(y.transpose(1, 2).flatten(2))


class SpatialBlock(nn.Module):
    """Self-attention, cross-attention, GEGLU."""

    def __init__(self, width: int, heads: int, context: int):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width, 1e-5) for _ in range(3))
        self.attn1, self.attn2 = CrossAttention(width, heads, width), CrossAttention(width, heads, context)
        self.ff_in, self.ff_out = nn.Linear(width, 8 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """[B, T, D] → [B, T, D]."""
        y = self.norm1(x)
        x = x + self.attn1(y, y)
        x = x + self.attn2(self.norm2(x), context)
        value, gate = self.ff_in(self.norm3(x)).chunk(2, -1)
        return x + self.ff_out(value * F.gelu(gate))


class SpatialTransformer(nn.Module):
    """Transformer blocks over all positions, with a residual."""

    def __init__(self, width: int, heads: int, depth: int, context: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, 1e-6)
        self.proj_in, self.proj_out = nn.Linear(width, width), nn.Linear(width, width)
        self.blocks = nn.ModuleList(SpatialBlock(width, heads, context) for _ in range(depth))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """[B, C, H, W] → same."""
        h, w = x.shape[2:]
        y = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))
        for block in self.blocks:
            y = block(y, context)
        return x + self.proj_out(y).transpose(1, 2).unflatten(2, (h, w))


class Level(nn.Module):
    """One resolution."""

    def __init__(self, resnets: list[Resnet], mixers: list[nn.Module | None], sampler: nn.Module | None):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.mixers = nn.ModuleList(m or nn.Identity() for m in mixers)
        self.mixes = [m is not None for m in mixers]
        self.sampler = sampler


class UNet(nn.Module):
    """Stable Diffusion's U-Net."""

    def __init__(self, c: dict[str, Any]):
        super().__init__()
        self.c, widths, groups = c, c["block_out_channels"], c["norm_num_groups"]
        time = 4 * widths[0]

        def at(name: str, i: int) -> int:
            return c[name] if isinstance(c[name], int) else c[name][i]

        def resnet(c_in: int, c_out: int) -> Resnet:
            return Resnet(c_in, c_out, time, groups, c["norm_eps"])

        def mixer(width: int, kind: str, i: int) -> nn.Module | None:
            if "CrossAttn" not in kind:
                return None
            depth, heads = at("transformer_layers_per_block", i), at("attention_head_dim", i)
            return SpatialTransformer(width, heads, depth, c["cross_attention_dim"], groups)

        self.time_embedding1, self.time_embedding2 = nn.Linear(widths[0], time), nn.Linear(time, time)
        if c["addition_embed_type"]:
            self.add_embedding1 = nn.Linear(c["projection_class_embeddings_input_dim"], time)
            self.add_embedding2 = nn.Linear(time, time)
        self.conv_in = nn.Conv2d(c["in_channels"], widths[0], 3, padding=1)
        skips, channels = [widths[0]], widths[0]
        down: list[Level] = []
        up: list[Level] = []
        for i, (width, kind) in enumerate(zip(widths, c["down_block_types"], strict=True)):
            resnets, mixers = [], []
            for _ in range(c["layers_per_block"]):
                resnets.append(resnet(channels, width))
                mixers.append(mixer(width, kind, i))
                channels = width
                skips.append(channels)
            last = i == len(widths) - 1
            if not last:
                skips.append(channels)
            down.append(Level(resnets, mixers, None if last else nn.Conv2d(channels, channels, 3, 2, 1)))
        self.down = nn.ModuleList(down)
        self.mid1, self.mid2 = resnet(channels, channels), resnet(channels, channels)
        self.mid_mixer: Any = mixer(channels, "CrossAttn", -1)
        for i, (width, kind) in enumerate(zip(reversed(widths), c["up_block_types"], strict=True)):
            resnets, mixers = [], []
            for _ in range(c["layers_per_block"] + 1):
                resnets.append(resnet(channels + skips.pop(), width))
                mixers.append(mixer(width, kind, len(widths) - 1 - i))
                channels = width
            last = i == len(widths) - 1
            up.append(Level(resnets, mixers, None if last else nn.Conv2d(channels, channels, 3, padding=1)))
        self.up = nn.ModuleList(up)
        self.conv_norm_out = nn.GroupNorm(groups, widths[0], c["norm_eps"])
        self.conv_out = nn.Conv2d(widths[0], c["out_channels"], 3, padding=1)

    def forward(self, x: Tensor, steps: Tensor, context: Tensor) -> Tensor:
        """[B, C, H, W], time steps [B], context [B, S, X] → [B, C, H, W]."""
        half = self.c["block_out_channels"][0] // 2
        frequency = torch.exp(-math.log(10000.0) * torch.arange(half, device=x.device) / half)
        angle = steps.float()[:, None] * frequency
        time = self.time_embedding1(torch.cat([angle.cos(), angle.sin()], -1).to(x.dtype))
        time = self.time_embedding2(F.silu(time))
        x = self.conv_in(x)
        skips = [x]
        level: Any
        for level in self.down:
            for resnet, mixer, mixes in zip(level.resnets, level.mixers, level.mixes, strict=True):
                x = resnet(x, time)
                x = mixer(x, context) if mixes else x
                skips.append(x)
            if level.sampler is not None:
                x = level.sampler(x)
                skips.append(x)
        x = self.mid_mixer(self.mid1(x, time), context)
        x = self.mid2(x, time)
        for level in self.up:
            for resnet, mixer, mixes in zip(level.resnets, level.mixers, level.mixes, strict=True):
                x = resnet(torch.cat([x, skips.pop()], 1), time)
                x = mixer(x, context) if mixes else x
            if level.sampler is not None:
                x = level.sampler(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv_out(F.silu(self.conv_norm_out(x)))


def alphas(device: torch.device) -> Tensor:
    """Cumulative products of the "scaled linear" schedule."""
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - beta, 0).to(torch.float32).to(device)


class AttentionPool(nn.Module):
    """Attention in which the mean of all patches reads every patch."""

    def __init__(self, width: int, heads: int, d_out: int, patches: int):
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(patches + 1, width))
        self.attention = Attention(width, heads, d_out=d_out)

    def forward(self, x: Tensor) -> Tensor:
        """[B, P, D] → [B, d_out]."""
        x = torch.cat([x.mean(1, keepdim=True), x], 1) + self.positions
        return self.attention(x[:, :1], x)[:, 0]


class Conditioner(nn.Module):
    """Features → what a published U-Net reads instead of a prompt."""

    def __init__(self, width: int, patches: int, c: dict[str, Any]):
        super().__init__()
        if c["pooled"]:
            self.context1, self.context2 = nn.Linear(width, c["context"]), nn.Linear(width, c["pooled"])
            self.pool = AttentionPool(width, c["heads"], c["pooled"], patches)
        else:
            self.context = nn.Linear(width, c["context"])
        if c["empty"]:
            self.empty = nn.Parameter(torch.zeros(c["empty"], c["context"]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Features [B, P, D] → context, pooled or None, which rows are read; the unconditional half below."""
        if hasattr(self, "pool"):
            context, pooled = torch.cat([self.context1(x), self.context2(x)], -1), self.pool(x)
            pooled = torch.cat([pooled, torch.zeros_like(pooled)])
        else:
            context, pooled = self.context(x), None
        nothing, mask = torch.zeros_like(context), torch.ones(2, *context.shape[:2], dtype=torch.bool, device=x.device)
        if hasattr(self, "empty"):
            nothing[:, : len(self.empty)] = self.empty
            mask[1, :, len(self.empty) :] = False
        return torch.cat([context, nothing]), pooled, mask.flatten(0, 1)


class LatentDecoder(nn.Module):
    """Feature decoder and conditioner of a U-Net of latents. The U-Net itself is opened by diffusers."""

    def __init__(self, encoder: dict[str, Any], tokenizer: dict[str, Any], conditioner: dict[str, Any]):
        super().__init__()
        patches = (encoder["image_size"] // encoder["patch_size"]) ** 2
        self.decoder = feature_decoder(encoder["width"], patches, tokenizer)
        self.conditioner = Conditioner(encoder["width"], patches, conditioner)
