"""The dynamic discrete image tokenizer: encoder, selector, merger, quantizer and feature decoder (LaVIT §3.1).

ILLUME's fixed-length semantic tokenizer is the same class with `selection="all"` and other loss settings.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from unimm_jax.models.tokenizer.feature_decoder import FeatureDecoder
from unimm_jax.models.tokenizer.merger import Merger, compact
from unimm_jax.models.tokenizer.quantizer import Quantizer
from unimm_jax.models.tokenizer.selector import Selector, argmax_mask, top_k_mask
from unimm_jax.models.vit import ViT, ViTConfig


@dataclasses.dataclass(frozen=True)
class ImageTokenizerConfig:
    """Shape of the image tokenizer. The defaults are LaVIT's (12 blocks, 16,384 codes of width 32).

    Attributes:
      selection: which patches are kept: "argmax", those with a keep probability above 0.5 (dynamic length; LaVIT);
        "top_k", the `top_k` most probable; "all", every patch (fixed length; ILLUME).
      positions: position of a kept token in the decoder: "order", its index among the kept tokens (LaVIT), or "grid",
        its patch.
      eps, sink: of the merger's policy softmax (`policy_attention`; 1e-6 and 0 in LaVIT).
      decoder_sink: sink of the decoder's cross-attention (0 in LaVIT).
      scan: scan over the blocks, so that only one is compiled.
      remat: what is recomputed in the backward pass, a name of `transformer.REMAT`.
    """

    heads: int = 16
    mlp_width: int = 6144
    merger_depth: int = 12
    decoder_depth: int = 12
    codes: int = 16384
    code_width: int = 32
    selection: str = "argmax"
    top_k: int = 0
    positions: str = "order"
    eps: float = 1e-6
    sink: float = 0.0
    decoder_sink: float = 0.0
    scan: bool = True
    remat: str = "none"

    def merger_flops(self, width: int, rows: int, num_patches: int) -> float:
        """Floating-point operations per image of the merger's forward pass on `rows` tokens out of `num_patches`."""
        self_attention = 8 * rows * width**2 + 4 * rows * rows * width
        cross_attention = 4 * rows * width**2 + 4 * num_patches * width**2 + 4 * rows * num_patches * width
        return self.merger_depth * (self_attention + cross_attention + 4 * rows * width * self.mlp_width)


class ImageTokenizer(nnx.Module):
    """Maps images to codes, and codes to reconstructed features. Every training stage keeps the encoder frozen."""

    def __init__(self, encoder: ViTConfig, config: ImageTokenizerConfig, *, rngs: nnx.Rngs):
        c, width = config, encoder.width
        self.config, self.encoder_config = config, encoder
        self.encoder = ViT(encoder, rngs=rngs)
        self.selector = Selector(width, rngs=rngs)
        run: dict[str, Any] = dict(scan=c.scan, remat=c.remat)
        self.merger = Merger(width, c.heads, c.mlp_width, c.merger_depth, rngs=rngs, eps=c.eps, sink=c.sink, **run)
        self.quantizer = Quantizer(width, c.codes, c.code_width, rngs=rngs)
        self.decoder = FeatureDecoder(
            c.code_width,
            width,
            c.heads,
            c.mlp_width,
            c.decoder_depth,
            encoder.num_patches,
            rngs=rngs,
            sink=c.decoder_sink,
            **run,
        )

    def decide(self, x_BPD: jax.Array) -> jax.Array:
        """The keep mask at inference: features [B, P, D] → boolean [B, P]. Deterministic; keeps at least one patch."""
        if self.config.selection == "all":
            return jnp.ones(x_BPD.shape[:2], bool)
        log_probs = self.selector(x_BPD)
        return top_k_mask(log_probs, self.config.top_k) if self.config.selection == "top_k" else argmax_mask(log_probs)

    def encode(self, images_BHWC: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Normalized pixels [B, H, W, 3] → (keep mask boolean [B, P], codes int32 [B, P], valid where kept)."""
        x_BPD = self.encoder(images_BHWC)
        keep_BP = self.decide(x_BPD)
        return keep_BP, self.codes_of(x_BPD, keep_BP)

    def codes_of(self, x_BPD: jax.Array, keep_BP: jax.Array) -> jax.Array:
        """Encoder features [B, P, D] and keep mask boolean [B, P] → codes int32 [B, P], valid where kept."""
        return self.quantizer.lookup(self.quantizer.project(self.merger.dense(x_BPD, keep_BP)))

    def position_index(self, keep_BP: jax.Array) -> jax.Array:
        """Decoder position of each patch, int32 [B, P]; see `ImageTokenizerConfig.positions`."""
        if self.config.positions == "grid":
            return jnp.broadcast_to(jnp.arange(keep_BP.shape[1]), keep_BP.shape)
        return jnp.maximum(jnp.cumsum(keep_BP.astype(jnp.int32), -1) - 1, 0)

    def decode(self, codes_BP: jax.Array, keep_BP: jax.Array) -> jax.Array:
        """Codes int32 [B, P], at their patches, and keep mask boolean [B, P] → reconstructed features [B, P, D]."""
        z_BPC = self.quantizer.rows(codes_BP)
        return self.decoder(z_BPC, self.position_index(keep_BP), keep_BP.astype(jnp.float32))


__all__ = ["ImageTokenizer", "ImageTokenizerConfig", "compact"]
