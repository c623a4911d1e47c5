"""The unified model: vision encoder, connector and language model.

Continuous input, discrete output (LaVIT §3.2, ILLUME §3): input images are features, generated images are codes of the
vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from unimm_jax.models.keys import Keys
from unimm_jax.models.language import LanguageConfig, LanguageModel
from unimm_jax.models.tokenizer import ImageTokenizerConfig
from unimm_jax.models.tokenizer.merger import Merger
from unimm_jax.models.transformer import Linear
from unimm_jax.models.vit import ViT, ViTConfig

CONNECTORS = ("merger", "mlp")


@dataclasses.dataclass(frozen=True)
class UnifiedConfig:
    """The connector from vision encoder to language model.

    Attributes:
      connector: "merger" applies the model's own copy of the merger to the kept tokens, then one linear layer (LaVIT);
        "mlp" applies a two-layer MLP to all encoder features (ILLUME).
      max_image_tokens: maximum number of features S per image; all of them for "mlp".
      patch_merge: side of the squares of neighboring patches whose features are concatenated to one, for "mlp" (2 for
        ILLUME's slices of 448 pixels, 256 features each).
    """

    connector: str = "merger"
    max_image_tokens: int = 256
    patch_merge: int = 1

    def features_of(self, num_patches: int) -> int:
        """Number of features of an image for the connector "mlp"."""
        return num_patches // self.patch_merge**2


class UnifiedModel(nnx.Module):
    """Vision encoder, connector (merger or MLP, and adapter) and language model.

    Encoder and merger are copies of the image tokenizer's, which are trained separately.

    Args (constructor):
      encoder: None builds the language model only (the text stage has no images).
      tokenizer: gives the shape of the merger.
      text_rows, visual_rows: rows of the two parts of the vocabulary.
    """

    def __init__(
        self,
        encoder: ViTConfig | None,
        tokenizer: ImageTokenizerConfig,
        language: LanguageConfig,
        config: UnifiedConfig,
        *,
        text_rows: int,
        visual_rows: int,
        rngs: Keys,
    ):
        self.config = config
        if encoder is not None:
            width = encoder.width
            self.encoder = ViT(encoder, rngs=rngs)
            t, merges = tokenizer, config.connector == "merger"
            options: dict = dict(eps=t.eps, sink=t.sink, scan=t.scan, remat=t.remat)
            self.merger = Merger(width, t.heads, t.mlp_width, t.merger_depth, rngs=rngs, **options) if merges else None
            if not merges:
                inner = width * config.patch_merge**2
                self.adapter_inner = Linear(inner, language.width, axes=("embed", "mlp"), rngs=rngs)
            d_in = width if merges else language.width
            self.adapter = Linear(d_in, language.width, axes=("mlp", "embed"), rngs=rngs)
        self.language = LanguageModel(language, text_rows, visual_rows, rngs=rngs)

    def features(self, images_MHWC: jax.Array, keep_MP: jax.Array) -> jax.Array:
        """Image features for the language model: [M, S, D], kept tokens in raster order, then unused rows.

        Args:
          images_MHWC: normalized pixels.
          keep_MP: boolean keep masks; ignored by the "mlp" connector, which returns all features.
        """
        x_MPD = self.encoder(images_MHWC)
        if self.merger is not None:
            return self.adapter(self.merger.kept(x_MPD, keep_MP, self.config.max_image_tokens))
        if self.config.patch_merge > 1:
            x_MPD = merge_patches(x_MPD, self.config.patch_merge)
        return self.adapter(jax.nn.gelu(self.adapter_inner(x_MPD), approximate=False))

    def inputs(self, tokens_BT: jax.Array, feature_index_BT: jax.Array, features_BRSD: jax.Array) -> jax.Array:
        """Input embeddings [B, T, D]: image features where `feature_index_BT` >= 0, else token embeddings.

        Args:
          tokens_BT: int32 token ids.
          feature_index_BT: int32 index into the flattened [R · S] features of the same batch row, or -1.
          features_BRSD: features of R images per row.
        """
        b, r, s, d = features_BRSD.shape
        x_BTD = self.language.embed(tokens_BT, features_BRSD.dtype)
        rows = jnp.take_along_axis(features_BRSD.reshape(b, r * s, d), jnp.maximum(feature_index_BT, 0)[..., None], 1)
        return jnp.where(feature_index_BT[..., None] >= 0, rows, x_BTD)


def merge_patches(x_MPD: jax.Array, side: int) -> jax.Array:
    """Concatenates the features of squares of `side` × `side` patches: [M, P, D] → [M, P / side², side² · D].

    Both are in raster order, and so are the patches of a square.
    """
    m, p, d = x_MPD.shape
    n = round(p**0.5) // side
    return x_MPD.reshape(m, n, side, n, side, d).swapaxes(2, 3).reshape(m, n * n, side * side * d)
