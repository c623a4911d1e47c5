"""The image tokenizer: a frozen encoder, a quantizer of its features, and a decoder that reconstructs the features.

LaVIT's is dynamic: selector, merger, quantizer and feature decoder (§3.1). ILLUME's is bidirectional: it keeps all
patches and has plain transformer blocks before and after the quantizer (§3.1).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from unimm_jax.models.keys import Keys
from unimm_jax.models.tokenizer.bidirectional import BidirectionalDecoder, BidirectionalEncoder
from unimm_jax.models.tokenizer.feature_decoder import FeatureDecoder
from unimm_jax.models.tokenizer.merger import Merger, compact
from unimm_jax.models.tokenizer.quantizer import Quantizer
from unimm_jax.models.tokenizer.selector import Selector, argmax_mask, bernoulli_mask, selection_noise, top_k_mask
from unimm_jax.models.transformer import LayerNorm
from unimm_jax.models.vit import ViT, ViTConfig


@dataclasses.dataclass(frozen=True)
class ImageTokenizerConfig:
    """Shape of the image tokenizer. The defaults are LaVIT's (12 blocks, 16,384 codes of width 32).

    Attributes:
      architecture: "dynamic", selector, causal merger and a decoder with one query per patch (LaVIT); "bidirectional",
        transformer blocks over all patches before and after the quantizer, without selector and merger (ILLUME).
      merger_depth, decoder_depth: number of blocks before and after the quantizer.
      quantizer: how codes are learned, "ema" or "simvq"; see `Quantizer`.
      selection: which patches are kept: "argmax", those with a keep probability above 0.5 (dynamic length); "sample",
        each with its keep probability (LaVIT's code); "top_k", the `top_k` most probable; "all", every patch (fixed
        length; ILLUME).
      positions: position of a kept token in the decoder: "order", its index among the kept tokens (LaVIT), or "grid",
        its patch.
      eps, sink: of the merger's policy softmax (`policy_attention`; 1e-6 and 0 in LaVIT).
      decoder_sink: sink of the decoder's cross-attention (0 in LaVIT). These three and `positions` have no effect in a
        bidirectional tokenizer.
      scan: scan over the blocks, so that only one is compiled.
      remat: what is recomputed in the backward pass, a name of `transformer.REMAT`.
    """

    architecture: str = "dynamic"
    quantizer: str = "ema"
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

    def noise(self, images: np.ndarray, num_patches: int) -> np.ndarray | None:
        """What `ImageTokenizer.decide` needs beside the features of images uint8 [N, S, S, 3].

        `selection_noise` [N, P] with the selection "sample", else None.
        """
        return selection_noise(images, num_patches) if self.selection == "sample" else None

    def merger_flops(self, width: int, rows: int, num_patches: int) -> float:
        """Floating-point operations per image of the merger's forward pass on `rows` tokens out of `num_patches`."""
        self_attention = 8 * rows * width**2 + 4 * rows * rows * width
        cross_attention = 4 * rows * width**2 + 4 * num_patches * width**2 + 4 * rows * num_patches * width
        return self.merger_depth * (self_attention + cross_attention + 4 * rows * width * self.mlp_width)


class ImageTokenizer(nnx.Module):
    """Maps images to codes, and codes to reconstructed features. Every training stage keeps the encoder frozen.

    Attributes:
      selector, merger: None in a bidirectional tokenizer.
      feature_encoder: blocks before the quantizer of a bidirectional tokenizer, else None.
    """

    selector: Selector | None
    merger: Merger | None
    feature_encoder: BidirectionalEncoder | None
    decoder: FeatureDecoder | BidirectionalDecoder

    def __init__(self, encoder: ViTConfig, config: ImageTokenizerConfig, *, rngs: Keys):
        c, width = config, encoder.width
        self.config, self.encoder_config = config, encoder
        self.encoder = ViT(encoder, rngs=rngs)
        shape = (width, c.heads, c.mlp_width)
        run: dict[str, Any] = dict(rngs=rngs, scan=c.scan, remat=c.remat)
        if c.architecture == "bidirectional":
            self.selector = self.merger = None
            self.feature_norm = LayerNorm(width, affine=False)
            self.feature_encoder = BidirectionalEncoder(*shape, c.merger_depth, **run)
        else:
            self.selector = Selector(width, rngs=rngs)
            self.merger = Merger(*shape, c.merger_depth, eps=c.eps, sink=c.sink, **run)
            self.feature_encoder = None
        self.quantizer = Quantizer(width, c.codes, c.code_width, rngs=rngs, kind=c.quantizer)
        decoder_shape = (c.code_width, *shape, c.decoder_depth, encoder.num_patches)
        if c.architecture == "bidirectional":
            self.decoder = BidirectionalDecoder(*decoder_shape, **run)
        else:
            self.decoder = FeatureDecoder(*decoder_shape, sink=c.decoder_sink, **run)

    def features(self, images_BHWC: jax.Array) -> jax.Array:
        """Normalized pixels [B, H, W, 3] → the features that codes represent and the decoder reconstructs, [B, P, D].

        Those of the encoder; in a bidirectional tokenizer after a LayerNorm without parameters (as ILLUME+'s code).
        """
        x_BPD = self.encoder(images_BHWC)
        return x_BPD if self.feature_encoder is None else self.feature_norm(x_BPD)

    def decide(self, x_BPD: jax.Array, noise_BP: jax.Array | None = None) -> jax.Array:
        """The keep mask at inference: features [B, P, D] → boolean [B, P]. Keeps at least one patch.

        Args:
          noise_BP: uniform numbers in [0, 1), required by the selection "sample" (`ImageTokenizerConfig.noise`).
        """
        selection = self.config.selection
        if selection == "all":
            return jnp.ones(x_BPD.shape[:2], bool)
        assert self.selector is not None
        log_probs = self.selector(x_BPD)
        if selection == "sample":
            assert noise_BP is not None, "the selection 'sample' needs noise"
            return bernoulli_mask(log_probs, noise_BP)
        return top_k_mask(log_probs, self.config.top_k) if selection == "top_k" else argmax_mask(log_probs)

    def encode(self, images_BHWC: jax.Array, noise_BP: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """Normalized pixels [B, H, W, 3] → (keep mask boolean [B, P], codes int32 [B, P], valid where kept)."""
        x_BPD = self.features(images_BHWC)
        keep_BP = self.decide(x_BPD, noise_BP)
        return keep_BP, self.codes_of(x_BPD, keep_BP)

    def project(self, x_BPD: jax.Array, keep_BP: jax.Array) -> jax.Array:
        """Features [B, P, D] and keep mask → vectors before quantization, float32 [B, P, C], valid where kept.

        Args:
          keep_BP: boolean, or float that may carry a gradient.
        """
        if self.feature_encoder is not None:
            return self.quantizer.project(self.feature_encoder(x_BPD))
        assert self.merger is not None
        return self.quantizer.project(self.merger.dense(x_BPD, keep_BP))

    def codes_of(self, x_BPD: jax.Array, keep_BP: jax.Array) -> jax.Array:
        """Features [B, P, D] and keep mask boolean [B, P] → codes int32 [B, P], valid where kept."""
        return self.quantizer.lookup(self.project(x_BPD, keep_BP))

    def position_index(self, keep_BP: jax.Array) -> jax.Array:
        """Decoder position of each patch, int32 [B, P]; see `ImageTokenizerConfig.positions`."""
        if self.config.positions == "grid":
            return jnp.broadcast_to(jnp.arange(keep_BP.shape[1]), keep_BP.shape)
        return jnp.maximum(jnp.cumsum(keep_BP.astype(jnp.int32), -1) - 1, 0)

    def reconstruct(self, z_BPC: jax.Array, keep_BP: jax.Array) -> jax.Array:
        """Vectors of codes [B, P, C], at their patches → reconstructed features [B, P, D], in the dtype of `z_BPC`.

        Args:
          keep_BP: boolean, or float that may carry a gradient.
        """
        if isinstance(self.decoder, BidirectionalDecoder):
            return self.decoder(z_BPC)
        index_BP = self.position_index(jax.lax.stop_gradient(keep_BP))
        return self.decoder(z_BPC, index_BP, keep_BP.astype(jnp.float32))

    def decode(self, codes_BP: jax.Array, keep_BP: jax.Array, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
        """Codes int32 [B, P], at their patches, and keep mask boolean [B, P] → reconstructed features [B, P, D].

        Args:
          dtype: of the decoder's activations and of the result.
        """
        return self.reconstruct(self.quantizer.rows(codes_BP).astype(dtype), keep_BP)


__all__ = ["BidirectionalDecoder", "FeatureDecoder", "ImageTokenizer", "ImageTokenizerConfig", "compact"]
