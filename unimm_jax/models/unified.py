"""The unified model: an encoder and a way in for pictures to be understood, and the language model that does the rest.

Continuous in, discrete out (LaVIT §3.2, ILLUME §3): pictures to be read enter as features, pictures to be written leave
as codes of the vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from unimm_jax.models.language import LanguageConfig, LanguageModel
from unimm_jax.models.tokenizer import TokenizerConfig
from unimm_jax.models.tokenizer.merger import Merger
from unimm_jax.models.transformer import Linear
from unimm_jax.models.vit import ViT, ViTConfig


@dataclasses.dataclass(frozen=True)
class UnifiedConfig:
    """How pictures enter.

    Attributes:
      way_in: "merger" runs the LM's own copy of the merger on the kept tokens, then one linear layer (LaVIT);
        "features" takes all encoder features through a two-layer MLP (ILLUME).
      budget: feature rows S a picture takes at most (all P patches for "features").
    """

    way_in: str = "merger"
    budget: int = 256


class UnifiedModel(nnx.Module):
    """Encoder (the LM's copy), merger (the LM's copy) or none, adapter, language model.

    Args (constructor):
      encoder: None leaves the language model alone (the text stage, which reads no pictures).
    """

    def __init__(
        self,
        encoder: ViTConfig | None,
        tokenizer: TokenizerConfig,
        language: LanguageConfig,
        config: UnifiedConfig,
        *,
        text_rows: int,
        visual_rows: int,
        rngs: nnx.Rngs,
    ):
        self.config = config
        if encoder is not None:
            width = encoder.width
            self.encoder = ViT(encoder, rngs=rngs)
            t, merges = tokenizer, config.way_in == "merger"
            options: dict = dict(eps=t.eps, sink=t.sink, scan=t.scan, remat=t.remat)
            self.merger = Merger(width, t.heads, t.mlp_width, t.merger_depth, rngs=rngs, **options) if merges else None
            if not merges:
                self.adapter_inner = Linear(width, language.width, axes=("embed", "mlp"), rngs=rngs)
            d_in = width if merges else language.width
            self.adapter = Linear(d_in, language.width, axes=("mlp", "embed"), rngs=rngs)
        self.language = LanguageModel(language, text_rows, visual_rows, rngs=rngs)

    def features(self, images_MHWC: jax.Array, keep_MP: jax.Array) -> jax.Array:
        """Normalised pixels and keep masks → what the LM reads: [M, S, D], kept tokens first, in raster order."""
        x_MPD = self.encoder(images_MHWC)
        if self.merger is not None:
            return self.adapter(self.merger.kept(x_MPD, keep_MP, self.config.budget))
        return self.adapter(jax.nn.gelu(self.adapter_inner(x_MPD), approximate=False))

    def inputs(self, tokens_BT: jax.Array, feature_index_BT: jax.Array, features_BRSD: jax.Array) -> jax.Array:
        """Input embeddings [B, T, D]: token rows, and feature rows wherever `feature_index_BT` is not negative.

        Args:
          feature_index_BT: row of the flattened [R · S] features of this batch row, or -1.
        """
        b, r, s, d = features_BRSD.shape
        x_BTD = self.language.embed(tokens_BT, features_BRSD.dtype)
        rows = jnp.take_along_axis(features_BRSD.reshape(b, r * s, d), jnp.maximum(feature_index_BT, 0)[..., None], 1)
        return jnp.where(feature_index_BT[..., None] >= 0, rows, x_BTD)
