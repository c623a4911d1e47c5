"""A unified image-and-text language model exported from unimm_jax, in PyTorch. This file needs torch and transformers.

    model = AutoModel.from_pretrained(DIR, trust_remote_code=True)
    keep, codes = model.tokenize(images)                    # uint8 [B, H, W, 3], or PIL images
    model.describe(images, ["how many circles are there?"]) # "" asks for a caption
    images = model.draw(["two red circles"], guidance=1.5)  # uint8 [1, H, W, 3]

Chats go through the processor, in `processing_unimm.py`; `model.generate` takes what it gives. The language model alone
opens with AutoModelForCausalLM. Parameters have the names of unimm_jax's tree.
"""

import importlib
import json
import math
import pathlib
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoProcessor

NEG_INF = -1e30


def patchify(x: Tensor, size: int) -> Tensor:
    """[B, H, W, C] → [B, P, size·size·C], raster order."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // size, size, w // size, size, c).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(b, (h // size) * (w // size), size * size * c)


def unpatchify(x: Tensor, size: int) -> Tensor:
    """The inverse of `patchify` for square images."""
    b, p, d = x.shape
    side, c = round(p**0.5), d // (size * size)
    x = x.reshape(b, side, side, size, size, c).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(b, side * size, side * size, c)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu2": lambda x: F.relu(x) ** 2,
    "silu": F.silu,
}


class Mlp(nn.Module):
    """Two linear layers with an activation between."""

    def __init__(self, width: int, hidden: int, activation: str = "gelu"):
        super().__init__()
        self.activation = activation
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] → [..., D]."""
        return self.down(ACTIVATIONS[self.activation](self.up(x)))


class Attention(nn.Module):
    """Multi-head attention with separate q, k, v and output."""

    def __init__(self, width: int, heads: int, biases: str = "qkv", d_out: int | None = None):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(width, width, bias=name in biases) for name in "qkv")
        self.o = nn.Linear(width, d_out or width)

    def split(self, x: Tensor) -> Tensor:
        """[B, T, D] → [B, N, T, H]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor, source: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """x [B, T, D] reads `source` (itself if None); boolean mask [B, T, S]."""
        source = x if source is None else source
        q, k, v = self.split(self.q(x)), self.split(self.k(source)), self.split(self.v(source))
        mask = None if mask is None else mask[:, None]
        return self.o(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))

    def with_policy(self, x: Tensor, source: Tensor, allowed: Tensor, eps: float, sink: float) -> Tensor:
        """LaVIT's policy softmax: masked keys leak eps; with `sink` there is one more key with score 0 and value 0."""
        q, k, v = self.split(self.q(x)), self.split(self.k(source)), self.split(self.v(source))
        scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
        allowed = allowed[:, None].float()
        if sink:
            top = torch.where(allowed > 0, scores, 0.0).amax(-1, keepdim=True).clamp(min=0)
        else:
            top = scores.amax(-1, keepdim=True)
        weights = torch.exp((scores - top).clamp(max=10)) * allowed
        total = weights.sum(-1, keepdim=True) + eps + (sink * torch.exp(-top) if sink else 0)
        probs = ((weights + eps / scores.shape[-1]) / total).to(v.dtype)
        return self.o((probs @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm encoder block."""

    def __init__(
        self, width: int, heads: int, hidden: int, eps: float = 1e-6, biases: str = "qkv", activation: str = "gelu"
    ):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.attention = Attention(width, heads, biases)
        self.mlp = Mlp(width, hidden, activation)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] → [B, T, D]."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """The vision transformer; returns patch features."""

    def __init__(self, c: dict[str, Any]):
        super().__init__()
        self.c, width = c, c["width"]
        patches = (c["image_size"] // c["patch_size"]) ** 2
        self.patch_embed = nn.Linear(3 * c["patch_size"] ** 2, width, bias=c["patch_bias"])
        if c["class_token"]:
            self.cls = nn.Parameter(torch.zeros(width))
        self.positions = nn.Parameter(torch.zeros(patches + c["class_token"], width))
        if c["input_norm"]:
            self.input_norm = nn.LayerNorm(width, c["eps"])
        shape = (width, c["heads"], c["mlp_width"], c["eps"], c["biases"], c["activation"])
        self.blocks = nn.ModuleList(Block(*shape) for _ in range(c["depth"]))
        if c["output_norm"] != "none":
            self.norm = nn.LayerNorm(width, c["eps"], elementwise_affine=c["output_norm"] == "affine")

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] → floats, normalized with the model's mean and standard deviation."""
        x = images.to(self.positions.device, torch.float32) / 255
        mean, std = (torch.tensor(self.c[name], device=x.device) for name in ("pixel_mean", "pixel_std"))
        return (x - mean) / std

    def forward(self, images: Tensor) -> Tensor:
        """Normalized [B, H, W, 3] → [B, P, D]."""
        c = self.c
        x = self.patch_embed(patchify(images.to(self.positions.dtype), c["patch_size"]))
        if c["class_token"]:
            x = torch.cat([self.cls.expand(len(x), 1, -1), x], 1)
        x = x + self.positions
        x = self.input_norm(x) if c["input_norm"] else x
        for block in self.blocks:
            x = block(x)
        x = x[:, 1:] if c["class_token"] else x
        return x if c["output_norm"] == "none" else self.norm(x)


class Selector(nn.Module):
    """Log-probabilities of keep (index 0) and drop."""

    def __init__(self, width: int):
        super().__init__()
        half = width // 2
        self.norm, self.inner = nn.LayerNorm(width, 1e-5), nn.Linear(width, width)
        self.out1, self.out2 = nn.Linear(width, half), nn.Linear(half, half // 2)
        self.out3 = nn.Linear(half // 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, P, D] → [B, P, 2]."""
        local, glob = F.gelu(self.inner(self.norm(x))).chunk(2, -1)
        u = torch.cat([local, glob.mean(1, keepdim=True).expand_as(glob)], -1)
        return self.out3(F.gelu(self.out2(F.gelu(self.out1(u))))).float().log_softmax(-1)


class MergerBlock(nn.Module):
    """Causal self-attention of kept tokens, cross-attention to dropped ones, feed-forward."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.norm0, self.norm1, self.norm2 = (nn.LayerNorm(width, 1e-5) for _ in range(3))
        self.causal, self.cross = Attention(width, heads), Attention(width, heads)
        self.mlp = Mlp(width, hidden)

    def forward(self, x: Tensor, source: Tensor, itself: Tensor, dropped: Tensor, eps: float, sink: float) -> Tensor:
        """Rows [B, T, D] → [B, T, D]."""
        y = self.norm0(x)
        x = x + self.causal.with_policy(y, y, itself, eps, sink)
        x = x + self.cross.with_policy(self.norm1(x), source, dropped, eps, sink)
        return x + self.mlp(self.norm2(x))


class Merger(nn.Module):
    """Folds dropped patches into kept ones."""

    def __init__(self, width: int, t: dict[str, Any]):
        super().__init__()
        self.eps, self.sink = t["eps"], t["sink"]
        self.source_norm, self.norm = nn.LayerNorm(width, 1e-5), nn.LayerNorm(width, 1e-5)
        shape = (width, t["heads"], t["mlp_width"])
        self.blocks = nn.ModuleList(MergerBlock(*shape) for _ in range(t["merger_depth"]))

    def run(self, x: Tensor, features: Tensor, itself: Tensor, dropped: Tensor) -> Tensor:
        """All blocks and the last norm."""
        source = self.source_norm(features)
        for block in self.blocks:
            x = block(x, source, itself, dropped, self.eps, self.sink)
        return self.norm(x)

    def dense(self, x: Tensor, keep: Tensor) -> Tensor:
        """Every position [B, P, D]; dropped rows are meaningless."""
        size, keep = x.shape[1], keep.float()
        eye = torch.eye(size, device=x.device)
        itself = (keep[:, None] + (1 - keep[:, None]) * eye) * torch.ones_like(eye).tril()
        return self.run(x, x, itself, (1 - keep[:, None]).expand_as(itself))

    def kept(self, x: Tensor, keep: Tensor) -> Tensor:
        """Kept rows of one image: [1, P, D], boolean [1, P] → [1, S, D]."""
        rows = x[:, keep[0]]
        count = rows.shape[1]
        itself = torch.ones(1, count, count, device=x.device).tril()
        dropped = (~keep)[:, None].expand(1, count, -1)
        return self.run(rows, x, itself, dropped)


class Quantizer(nn.Module):
    """Nearest code of a low-dimensional unit vector."""

    def __init__(self, width: int, t: dict[str, Any]):
        super().__init__()
        self.proj1, self.proj2 = nn.Linear(width, width), nn.Linear(width, t["code_width"])
        self.codebook = nn.Parameter(torch.zeros(t["codes"], t["code_width"]))
        self.count = nn.Parameter(torch.zeros(t["codes"]))
        self.is_simvq = t["quantizer"] == "simvq"
        if self.is_simvq:
            self.code_map = nn.Linear(t["code_width"], t["code_width"], bias=False)

    @property
    def vectors(self) -> Tensor:
        """The codes' vectors [K, C]."""
        return self.code_map(self.codebook) if self.is_simvq else self.codebook

    def distances(self, x: Tensor) -> Tensor:
        """[..., D] → squared distances to the codes [..., K]."""
        z = F.normalize(self.proj2(torch.tanh(self.proj1(x))).float(), dim=-1)
        book = self.vectors.float()
        return (z * z).sum(-1, keepdim=True) + (book * book).sum(-1) - 2 * z @ book.T

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] → codes [...]."""
        return self.distances(x).argmin(-1)


class DecoderBlock(nn.Module):
    """Self-attention of the queries, cross-attention to the codes, feed-forward."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.norm0, self.norm1, self.norm2 = (nn.LayerNorm(width, 1e-5) for _ in range(3))
        self.attention, self.cross = Attention(width, heads), Attention(width, heads)
        self.mlp = Mlp(width, hidden)

    def forward(self, q: Tensor, codes: Tensor, valid: Tensor, sink: float) -> Tensor:
        """Queries [B, P, D] → [B, P, D]."""
        q = q + self.attention(self.norm0(q))
        y = self.norm1(q)
        q = q + (self.cross.with_policy(y, codes, valid, 0.0, sink) if sink else self.cross(y, codes, valid > 0.5))
        return q + self.mlp(self.norm2(q))


class FeatureDecoder(nn.Module):
    """Code rows → the encoder's features."""

    def __init__(self, width: int, patches: int, t: dict[str, Any]):
        super().__init__()
        self.sink = t["decoder_sink"]
        self.inner = nn.Linear(t["code_width"], width)
        self.positions = nn.Parameter(torch.zeros(patches, width))
        self.queries = nn.Parameter(torch.zeros(patches, width))
        shape = (width, t["heads"], t["mlp_width"])
        self.blocks = nn.ModuleList(DecoderBlock(*shape) for _ in range(t["decoder_depth"]))
        self.norm = nn.LayerNorm(width, 1e-5)
        self.out1, self.out2 = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, z: Tensor, index: Tensor, valid: Tensor) -> Tensor:
        """Rows [B, S, C], their positions [B, S], which of them exist → [B, P, D]."""
        x = self.inner(z) + self.positions[index]
        q = self.queries.expand(len(z), -1, -1)
        valid = valid.float()[:, None].expand(-1, q.shape[1], -1)
        for block in self.blocks:
            q = block(q, x, valid, self.sink)
        return self.out2(torch.tanh(self.out1(self.norm(q))))


class BidirectionalEncoder(nn.Module):
    """Blocks before the quantizer of a bidirectional tokenizer."""

    def __init__(self, width: int, t: dict[str, Any]):
        super().__init__()
        shape = (width, t["heads"], t["mlp_width"])
        self.blocks = nn.ModuleList(Block(*shape, biases="qv") for _ in range(t["merger_depth"]))
        self.norm = nn.LayerNorm(width, 1e-5)

    def forward(self, x: Tensor) -> Tensor:
        """[B, P, D] → [B, P, D]."""
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class BidirectionalDecoder(nn.Module):
    """Code rows of all patches → the encoder's normalized features."""

    def __init__(self, width: int, patches: int, t: dict[str, Any]):
        super().__init__()
        self.inner = nn.Linear(t["code_width"], width)
        self.positions = nn.Parameter(torch.zeros(patches, width))
        shape = (width, t["heads"], t["mlp_width"])
        self.blocks = nn.ModuleList(Block(*shape, biases="qv") for _ in range(t["decoder_depth"]))
        self.norm, self.out = nn.LayerNorm(width, 1e-5), nn.Linear(width, width)

    def forward(self, z: Tensor) -> Tensor:
        """Rows [B, P, C] → [B, P, D]."""
        x = self.inner(z) + self.positions
        for block in self.blocks:
            x = block(x)
        return F.layer_norm(self.out(self.norm(x)), x.shape[-1:], eps=1e-5)


def feature_decoder(width: int, patches: int, t: dict[str, Any]) -> nn.Module:
    """The decoder of a tokenizer with the settings `t`."""
    kind: Any = BidirectionalDecoder if t["architecture"] == "bidirectional" else FeatureDecoder
    return kind(width, patches, t)


def selection_noise(images: Tensor, patches: int) -> Tensor:
    """Uniform numbers [N, P] that are a function of the pixels of each image, uint8 [N, H, W, 3]."""
    seeds = [zlib.crc32(image.cpu().contiguous().numpy().tobytes()) for image in images]
    rows = [np.random.default_rng(seed).random(patches, np.float32) for seed in seeds]
    return torch.from_numpy(np.stack(rows)).to(images.device)


class ImageTokenizer(nn.Module):
    """Images to codes, codes to features."""

    def __init__(self, encoder: dict[str, Any], t: dict[str, Any]):
        super().__init__()
        self.t, width = t, encoder["width"]
        self.patches = (encoder["image_size"] // encoder["patch_size"]) ** 2
        self.encoder, self.is_bidirectional = ViT(encoder), t["architecture"] == "bidirectional"
        if self.is_bidirectional:
            self.feature_encoder = BidirectionalEncoder(width, t)
        else:
            self.selector, self.merger = Selector(width), Merger(width, t)
        self.quantizer = Quantizer(width, t)
        self.decoder = feature_decoder(width, self.patches, t)

    def decide(self, x: Tensor, images: Tensor) -> Tensor:
        """The keep mask, boolean [B, P], of features [B, P, D] of images, uint8; keeps at least the likeliest patch."""
        if self.t["selection"] == "all":
            return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        keep, drop = self.selector(x).unbind(-1)
        if self.t["selection"] == "top_k":
            order = torch.argsort(-keep, dim=-1, stable=True)
            return torch.argsort(order, dim=-1, stable=True) < self.t["top_k"]
        sampled = self.t["selection"] == "sample"
        mask = keep.exp() > selection_noise(images, self.patches).to(x.device) if sampled else keep > drop
        best = F.one_hot(keep.argmax(-1), keep.shape[-1]).bool()
        return torch.where(mask.any(-1, keepdim=True), mask, best)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images, uint8 → (keep [B, P], codes [B, P])."""
        x = self.encoder(self.encoder.normalize(images))
        if self.is_bidirectional:
            x = F.layer_norm(x, x.shape[-1:], eps=1e-5)
            return self.decide(x, images), self.quantizer(self.feature_encoder(x))
        keep = self.decide(x, images)
        return keep, self.quantizer(self.merger.dense(x, keep))

    def decode(self, codes: Tensor, keep: Tensor, decoder: nn.Module | None = None) -> Tensor:
        """Codes at their patches → features [B, P, D], by the tokenizer's own decoder or another."""
        rows = self.quantizer.vectors[codes]
        if self.is_bidirectional:
            return (decoder or self.decoder)(rows)
        index = torch.arange(keep.shape[1], device=keep.device).expand_as(codes)
        if self.t["positions"] != "grid":
            index = (keep.long().cumsum(-1) - 1).clamp(min=0)
        return (decoder or self.decoder)(rows, index, keep)


class PixelDecoder(nn.Module):
    """Features → pixels in [0, 1] in one pass."""

    def __init__(self, c: dict[str, Any], width: int, patch: int):
        super().__init__()
        self.patch = patch
        self.inner = nn.Linear(width, c["width"])
        shape = (c["width"], c["heads"], c["mlp_width"])
        self.blocks = nn.ModuleList(Block(*shape, activation="relu2") for _ in range(c["depth"]))
        self.out = nn.Linear(c["width"], patch * patch * 3)

    def forward(self, x: Tensor) -> Tensor:
        """[B, P, D] → [B, H, W, 3]."""
        x = self.inner(x)
        for block in self.blocks:
            x = block(x)
        return unpatchify(torch.sigmoid(self.out(x)), self.patch)


# ---- The U-Net, [B, C, H, W] -----------------------------------------------------------------------------------------


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


# ---- The whole model ------------------------------------------------------------------------------------------------


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


class UniMM(nn.Module):
    """One decoder-only language model that reads images and generates them.

    Args (constructor):
      settings: `unimm.json`. language: the language model. processor: of the same directory.
    """

    def __init__(self, settings: dict[str, Any], language: nn.Module, processor: Any):
        super().__init__()
        self.settings, self.language, self.processor = settings, language, processor
        m, width = settings["model"], settings["model"]["encoder"]["width"]
        self.image_size: int = m["encoder"]["image_size"]
        self.image_tokenizer = ImageTokenizer(m["encoder"], m["image_tokenizer"])
        self.encoder = ViT(m["encoder"])
        config: Any = language.config
        d: int = config.hidden_size
        self.has_merger = m["unified"]["connector"] == "merger"
        if self.has_merger:
            self.merger = Merger(width, m["image_tokenizer"])
            self.adapter = nn.Linear(width, d)
        else:
            self.adapter_inner, self.adapter = nn.Linear(width, d), nn.Linear(d, d)
        if "pixel_decoder" in m:
            self.pixel_decoder = PixelDecoder(m["pixel_decoder"], width, m["encoder"]["patch_size"])
        if "unet" in m:
            self.unet = UNet(m["unet"])
        latent = {
            name: LatentDecoder(m["encoder"], m["image_tokenizer"], part["conditioner"])
            for name, part in settings["latent"].items()
        }
        self.latent = nn.ModuleDict(latent)
        self.decoders = [name for name in ("pixel_decoder",) if name in m]
        self.decoders += (["unet_decoder"] if "unet" in m else []) + list(latent)
        self.folder = pathlib.Path()
        self.opened: dict[str, tuple[Any, Any]] = {}

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """AutoModel calls this for classes of remote code; it does nothing."""

    @classmethod
    def from_pretrained(cls, path: str, *args: Any, **kwargs: Any) -> "UniMM":
        """Opens an exported directory."""
        del args
        from safetensors.torch import load_file

        folder = pathlib.Path(path)
        settings = json.loads((folder / "unimm.json").read_text())
        dtype = kwargs.get("dtype") or kwargs.get("torch_dtype")
        dtype = dtype if isinstance(dtype, torch.dtype) else None
        language = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto")
        model = cls(settings, language, AutoProcessor.from_pretrained(folder, trust_remote_code=True))
        weights = load_file(folder / "unimm.safetensors")
        own = {k for k in model.state_dict() if not k.startswith("language.")}
        model.folder = folder
        if own != set(weights):
            raise ValueError(f"{folder} does not fit: {sorted(own ^ set(weights))[:10]}")
        model.load_state_dict(weights, strict=False)
        return (model.to(dtype) if dtype else model).eval()

    # Reading

    @torch.no_grad()
    def tokenize(self, images: Any) -> tuple[Tensor, Tensor]:
        """Images of any kind that the processor takes → (keep boolean [B, P], codes [B, P])."""
        return self.image_tokenizer.encode(self.processor(images)["pixel_values"])

    def features(self, image: Tensor, keep: Tensor) -> Tensor:
        """What the language model reads of one image, uint8 [H, W, 3]: [S, D]."""
        x = self.encoder(self.encoder.normalize(image[None]))
        if self.has_merger:
            return self.adapter(self.merger.kept(x, keep[None]))[0]
        return self.adapter(F.gelu(self.adapter_inner(x)))[0]

    def embed(self, ids: Sequence[int]) -> Tensor:
        """Token ids → [1, T, D]."""
        table = self.language.get_input_embeddings()  # type: ignore[operator]
        return table(torch.tensor([list(ids)], device=table.weight.device))

    def embed_prompt(self, ids: Sequence[int], images: Tensor, keep: Tensor) -> Tensor:
        """Ids of a prompt without padding, its images uint8 [N, S, S, 3] and their keep masks → [1, T, D]."""
        placed, where = self.processor.place_images(ids, keep)
        x = self.embed(placed)
        limit = self.settings["max_image_tokens"]
        read = zip(images, keep, strict=True)
        rows = [self.features(image, mask)[: min(int(mask.sum()), limit)] for image, mask in read]
        if rows:
            x[0, where] = torch.cat(rows).to(x.dtype)
        return x

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        max_new_tokens: int = 40,
    ) -> Tensor:
        """Greedy text after each prompt: ids [B, T + new], padded on the right; what is new ends with `eos`.

        Args:
          input_ids, attention_mask, pixel_values: from the processor; the images of all prompts in order.
        """
        eos, pad, start, end = (self.settings[name] for name in ("eos", "pad", "start", "end"))
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        prompts = [row[own.bool()].tolist() for row, own in zip(input_ids, mask, strict=True)]
        counts = [sum(pair == (start, end) for pair in zip(ids, ids[1:], strict=False)) for ids in prompts]
        images = torch.zeros(0, self.image_size, self.image_size, 3) if pixel_values is None else pixel_values
        keep = self.tokenize(images)[0] if len(images) else torch.zeros(0, self.settings["num_patches"])
        if len(images) != sum(counts):
            raise ValueError(f"the prompts have {sum(counts)} images, and pixel_values has {len(images)}")
        parts = zip(prompts, images.split(counts), keep.split(counts), strict=True)
        found = [self.write(self.embed_prompt(*part), max_new_tokens) for part in parts]
        length = max(map(len, found))
        new = torch.tensor([ids + [pad] * (length - len(ids)) for ids in found], dtype=torch.long)
        return torch.cat([input_ids, new.to(input_ids.device)], 1)

    def write(self, x: Tensor, length: int) -> list[int]:
        """At most `length` ids of greedy text after a prompt [1, T, D], with the end-of-text id if it ends."""
        ids: list[int] = []
        cache = None
        while len(ids) < length and ids[-1:] != [self.settings["eos"]]:
            out = self.language(inputs_embeds=x, past_key_values=cache, use_cache=True)
            cache, logits = out.past_key_values, out.logits[0, -1].float()
            logits[self.settings["text_rows"] :] = NEG_INF
            logits[self.settings["banned"]] = NEG_INF
            ids.append(int(logits.argmax()))
            x = self.embed(ids[-1:])
        return ids

    @torch.no_grad()
    def describe(self, images: Any, questions: str | Sequence[str] | None = None, length: int = 40) -> list[str]:
        """Greedy answers, one per image; an empty question asks for a caption.

        Args:
          images: of any kind that the processor takes. questions: one per image, or one for all. length: maximum tokens
            per answer.
        """
        images = self.processor(images)["pixel_values"]
        if questions is None or isinstance(questions, str):
            questions = [questions or ""] * len(images)
        texts = [self.processor.ask(question) for question in questions]
        inputs = self.processor(images, texts)
        found = self.generate(**inputs, max_new_tokens=length)[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.batch_decode(found, skip_special_tokens=True)]

    # Generating images

    @torch.no_grad()
    def generate_image_tokens(
        self,
        prompts: Sequence[str],
        guidance: float = 1.0,
        temperature: float = 1.0,
        top_k: int = 0,
        generator: torch.Generator | None = None,
    ) -> list[list[int]]:
        """Image token ids for each prompt; temperature 0 is greedy, top_k 0 chooses from all tokens."""
        s = self.settings
        found = []
        for prompt in prompts:
            streams = [self.processor.encode([("bos",), ("text", prompt), ("image_start",)])]
            streams += [[s["start"]]] if guidance != 1 else []
            caches: list[Any] = [None] * len(streams)
            ids: list[int] = []
            position = -1
            for _ in range(s["max_image_tokens"] * (2 if s["num_position_ids"] else 1) + 1):
                logp = []
                for i, stream in enumerate(streams):
                    inputs = stream if caches[i] is None else ids[-1:]
                    out = self.language(inputs_embeds=self.embed(inputs), past_key_values=caches[i], use_cache=True)
                    caches[i] = out.past_key_values
                    logp.append(out.logits[0, -1].float().log_softmax(-1))
                score = logp[0] if guidance == 1 else logp[1] + guidance * (logp[0] - logp[1])
                score = torch.where(self.legal(ids, position).to(score.device), score, NEG_INF)
                if temperature == 0:
                    token = int(score.argmax())
                else:
                    score = score / temperature
                    if top_k:
                        score[score < score.topk(min(top_k, len(score))).values[-1]] = NEG_INF
                    token = int(torch.multinomial(score.softmax(-1), 1, generator=generator))
                if token == s["end"]:
                    break
                ids.append(token)
                position = token - s["first_position"] if token >= s["first_position"] else position
            found.append(ids)
        return found

    def legal(self, ids: list[int], position: int) -> Tensor:
        """Which ids may follow inside an image, boolean [V]; `position` is the last one, -1 before the first."""
        s = self.settings
        mask = torch.zeros(self.language.config.vocab_size, dtype=torch.bool)  # type: ignore
        count = sum(s["first_code"] <= i < s["first_code"] + s["codes"] for i in ids)
        if s["num_position_ids"]:
            if ids and ids[-1] >= s["first_position"]:
                mask[s["first_code"] : s["first_code"] + s["codes"]] = True
                return mask
            mask[s["first_position"] + position + 1 : s["first_position"] + s["num_position_ids"]] = True
            mask[s["end"]] = count > 0
            return mask
        full = count >= s["max_image_tokens"]
        mask[s["first_code"] : s["first_code"] + s["codes"]] = not full
        mask[s["end"]] = full or (count > 0 and s["selection"] != "all")
        return mask

    def codes(self, ids: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Image token ids → (codes [N, P], keep [N, P])."""
        s = self.settings
        codes = torch.zeros(len(ids), s["num_patches"], dtype=torch.long)
        keep = torch.zeros_like(codes, dtype=torch.bool)
        for row, sequence in enumerate(ids):
            position = -1
            for token in sequence:
                if s["num_position_ids"] and token >= s["first_position"]:
                    position = token - s["first_position"]
                elif s["first_code"] <= token < s["first_code"] + s["codes"]:
                    position += 0 if s["num_position_ids"] else 1
                    if 0 <= position < s["num_patches"]:
                        codes[row, position], keep[row, position] = token - s["first_code"], True
        return codes, keep

    @torch.no_grad()
    def decode(
        self,
        codes: Tensor,
        keep: Tensor,
        decoder: str = "",
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """Codes → uint8 [N, H, W, 3].

        Args:
          decoder: one of `decoders`; the first one if empty. U-Nets of latents need diffusers.
          noise: [N, h, w, C] that a U-Net starts from. size: (H, W), for U-Nets of latents.
        """
        decoder = decoder or (self.decoders[0] if self.decoders else "pixel_decoder")
        if decoder not in self.decoders:
            raise ValueError(f"this model has no {decoder}; its decoders are {', '.join(self.decoders) or 'none'}")
        if decoder == "pixel_decoder":
            pixels = self.pixel_decoder(self.image_tokenizer.decode(codes, keep))
        elif decoder in self.latent:
            pixels = (self.decode_latent(decoder, codes, keep, noise, generator, size) + 1) / 2
        else:
            pixels = (self.decode_pixels(self.image_tokenizer.decode(codes, keep), noise, generator) + 1) / 2
        return (pixels.float().clamp(0, 1) * 255 + 0.5).to(torch.uint8)

    def decode_pixels(self, context: Tensor, noise: Tensor | None, generator: torch.Generator | None) -> Tensor:
        """Samples a U-Net of unshuffled pixels: [N, H, W, 3] in [-1, 1]."""
        d = self.settings["diffusion"]
        side = self.image_size // d["unshuffle"]
        if noise is None:
            noise = torch.randn(len(context), side, side, 3 * d["unshuffle"] ** 2, generator=generator)
        both = torch.cat([context, torch.zeros_like(context)])

        def predict(x: Tensor, steps: Tensor) -> Tensor:
            return self.unet(x.to(context.dtype), steps, both)

        x = self.diffuse(predict, noise.permute(0, 3, 1, 2).to(context.device), d, clip=True)
        return unpatchify(x.permute(0, 2, 3, 1).flatten(1, 2), d["unshuffle"])

    def open_latent(self, name: str, dtype: torch.dtype, device: torch.device) -> tuple[Any, Any]:
        """The U-Net and the autoencoder of a decoder, opened by diffusers once."""
        if name not in self.opened:
            diffusers = importlib.import_module("diffusers")
            folder = self.folder / self.settings["latent"][name]["folder"]
            unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=dtype)
            vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=dtype)
            self.opened[name] = unet.to(device), vae.to(device)
        return self.opened[name]

    def decode_latent(
        self,
        name: str,
        codes: Tensor,
        keep: Tensor,
        noise: Tensor | None,
        generator: torch.Generator | None,
        size: tuple[int, int] | None,
    ) -> Tensor:
        """Samples a U-Net of an autoencoder's latents: [N, H, W, 3] in about [-1, 1]."""
        d, part = self.settings["latent"][name], self.latent[name]
        x = self.image_tokenizer.decode(codes, keep, part.decoder)  # type: ignore[arg-type]
        unet, vae = self.open_latent(name, x.dtype, x.device)
        height, width = size or (d["pixel_size"],) * 2
        shrink = 2 ** (len(vae.config.block_out_channels) - 1)
        shape = (len(codes), height // shrink, width // shrink, vae.config.latent_channels)
        noise = torch.randn(shape, generator=generator) if noise is None else noise
        context, pooled, mask = part.conditioner(x)  # type: ignore[operator]
        more = {}
        if pooled is not None:
            sizes = torch.tensor([height, width, 0, 0, height, width], dtype=x.dtype, device=x.device)
            more["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": sizes.expand(len(pooled), 6)}

        def predict(z: Tensor, t: Tensor) -> Tensor:
            return unet(z.to(x.dtype), t, context, encoder_attention_mask=mask, **more).sample

        z = self.diffuse(predict, noise.permute(0, 3, 1, 2).to(x.device), d, clip=False)
        return vae.decode(z.to(x.dtype) / vae.config.scaling_factor).sample.permute(0, 2, 3, 1)

    def diffuse(self, predict: Callable[[Tensor, Tensor], Tensor], x: Tensor, d: dict[str, Any], clip: bool) -> Tensor:
        """DDIM with guidance from noise [N, C, h, w]; `predict` takes and gives both halves, conditional first."""
        table, stride = alphas(x.device), 1000 // d["steps"]
        for t in range((d["steps"] - 1) * stride + 1, 0, -stride):
            t = min(t, 999)
            a, b = table[t], table[t - stride] if t >= stride else table[0]
            steps = torch.full((2 * len(x),), t, device=x.device)
            found, free = predict(torch.cat([x, x]), steps).float().chunk(2)
            guided = free + d["guidance"] * (found - free)
            clean = guided if d["prediction"] == "sample" else (x - (1 - a).sqrt() * guided) / a.sqrt()
            clean = clean.clamp(-1, 1) if clip else clean
            eps = (x - a.sqrt() * clean) / (1 - a).sqrt()
            x = b.sqrt() * clean + (1 - b).sqrt() * eps
        return x

    def draw(
        self, prompts: Sequence[str], decoder: str = "", size: tuple[int, int] | None = None, **sampling: Any
    ) -> Tensor:
        """Prompts → uint8 [N, H, W, 3]; `sampling` as for `generate_image_tokens`."""
        return self.decode(*self.codes(self.generate_image_tokens(prompts, **sampling)), decoder, size=size)
