"""The pixel decoder stage: reconstructed features to pixels in one pass, for small images."""

import jax
import jax.numpy as jnp

from unimm_jax.models.pixel_decoder import PixelDecoderConfig
from unimm_jax.objectives.base import Aux, Batch, Tree
from unimm_jax.objectives.image_decoding import ImageDecoding, to_uint8


class PixelDecoding(ImageDecoding):
    """Loss: mean absolute error + 2 × mean squared error of pixels in [0, 1]. Batch: see `ImageDecoding`."""

    sections = ImageDecoding.sections | {"pixel_decoder": PixelDecoderConfig}

    def loss(self, params: Tree, batch: Batch, key: jax.Array, step: jax.Array) -> tuple[jax.Array, Aux]:
        """See `Objective.loss`."""
        model = self.module(params)
        found = model.pixel_decoder(self.features(model, batch)).astype(jnp.float32)
        gap = found - batch["images"].astype(jnp.float32) / 255
        mse = (gap * gap).mean()
        return jnp.abs(gap).mean() + 2 * mse, Aux({"pixel_mse": mse})

    def _decode(
        self, params: Tree, codes: jax.Array, keep: jax.Array, key: jax.Array, size: tuple[int, int] | None = None
    ) -> jax.Array:
        model = self.module(params)
        return to_uint8(model.pixel_decoder(self.features(model, {"codes": codes, "keep": keep})))
