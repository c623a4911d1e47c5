"""Images to codes and back, in PyTorch: vision encoder, image tokenizer and pixel decoder of an exported model.

`modeling_unimm.py` opens the whole model. Parameters have the names of unimm_jax's tree.
"""

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

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

    def __init__(self, c: dict[str, Any], encoder: dict[str, Any]):
        super().__init__()
        self.patch = patch = encoder["patch_size"]
        self.inner = nn.Linear(encoder["width"], c["width"])
        shape = (c["width"], c["heads"], c["mlp_width"])
        self.blocks = nn.ModuleList(Block(*shape, activation="relu2") for _ in range(c["depth"]))
        self.out = nn.Linear(c["width"], patch * patch * 3)

    def forward(self, x: Tensor) -> Tensor:
        """[B, P, D] → [B, H, W, 3]."""
        x = self.inner(x)
        for block in self.blocks:
            x = block(x)
        return unpatchify(torch.sigmoid(self.out(x)), self.patch)
