"""The dynamic discrete visual tokenizer: encoder, selector, merger, quantizer, feature decoder (LaVIT §3.1).

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
class TokenizerConfig:
    """Shape of the tokenizer. The defaults are LaVIT's (width 1408, 12 blocks, 16,384 codes of 32).

    Attributes:
      selection: "argmax" keeps what the selector's log-probabilities prefer (dynamic), "top_k" the `top_k` likeliest,
        "all" every patch (fixed length; ILLUME).
      positions: what the decoder knows of a kept token: "order" among the kept (LaVIT) or "grid", its patch.
      eps, sink: policy softmax of the merger; `decoder_sink`: zero key in the decoder (LaVIT: 1e-6, 0, 0).
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

    def merger_flops(self, width: int, rows: int, patches: int) -> float:
        """Operations of the merger's forward pass on `rows` tokens of a picture of `patches`."""
        itself = 8 * rows * width**2 + 4 * rows * rows * width
        cross = 4 * rows * width**2 + 4 * patches * width**2 + 4 * rows * patches * width
        return self.merger_depth * (itself + cross + 4 * rows * width * self.mlp_width)


class VisualTokenizer(nnx.Module):
    """Pictures to codes and back to features. The encoder is frozen wherever this class trains."""

    def __init__(self, encoder: ViTConfig, config: TokenizerConfig, *, rngs: nnx.Rngs):
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
            encoder.patches,
            rngs=rngs,
            sink=c.decoder_sink,
            **run,
        )

    def decide(self, x_BPD: jax.Array) -> jax.Array:
        """The keep mask at inference, boolean [B, P]; deterministic, at least one patch kept."""
        if self.config.selection == "all":
            return jnp.ones(x_BPD.shape[:2], bool)
        log_probs = self.selector(x_BPD)
        return top_k_mask(log_probs, self.config.top_k) if self.config.selection == "top_k" else argmax_mask(log_probs)

    def encode(self, images_BHWC: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Normalised pixels → (keep mask boolean [B, P], codes int32 [B, P], meaningful where kept)."""
        x_BPD = self.encoder(images_BHWC)
        keep_BP = self.decide(x_BPD)
        return keep_BP, self.codes_of(x_BPD, keep_BP)

    def codes_of(self, x_BPD: jax.Array, keep_BP: jax.Array) -> jax.Array:
        """Codes int32 [B, P] of encoder features under a given keep mask."""
        return self.quantizer.lookup(self.quantizer.project(self.merger.dense(x_BPD, keep_BP)))

    def position_index(self, keep_BP: jax.Array) -> jax.Array:
        """Which decoder position each patch's token gets, int32 [B, P] (see `TokenizerConfig.positions`)."""
        if self.config.positions == "grid":
            return jnp.broadcast_to(jnp.arange(keep_BP.shape[1]), keep_BP.shape)
        return jnp.maximum(jnp.cumsum(keep_BP.astype(jnp.int32), -1) - 1, 0)

    def decode(self, codes_BP: jax.Array, keep_BP: jax.Array) -> jax.Array:
        """Codes at their patches and the keep mask → reconstructed features [B, P, D]."""
        z_BPC = self.quantizer.rows(codes_BP)
        return self.decoder(z_BPC, self.position_index(keep_BP), keep_BP.astype(jnp.float32))


__all__ = ["TokenizerConfig", "VisualTokenizer", "compact"]
