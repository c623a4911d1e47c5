"""Base of the decoder stages, from codes to pixels: the frozen image tokenizer, its features, and the input."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from unimm_jax.config import Config, RecordDataConfig
from unimm_jax.data import pipeline
from unimm_jax.models.conditioner import Conditioner
from unimm_jax.models.denoiser import UNet
from unimm_jax.models.keys import Keys
from unimm_jax.models.pixel_decoder import PixelDecoder
from unimm_jax.models.tokenizer import ImageTokenizer, ImageTokenizerConfig
from unimm_jax.models.vae import VAE
from unimm_jax.models.vit import ViTConfig
from unimm_jax.objectives.base import Batch, BatchSpec, Objective, Tree, image_spec
from unimm_jax.plotting import grid
from unimm_jax.text_tokenizer import TextTokenizer


class ImageDecoder(nnx.Module):
    """The frozen image tokenizer and a decoder: `pixel_decoder`, or `unet` with optional `vae` and `conditioner`.

    Args (constructor):
      m: model sections of the config: name → dataclass.
    """

    def __init__(self, m: dict[str, Any], *, rngs: Keys):
        encoder: ViTConfig = m["encoder"]
        self.image_tokenizer = ImageTokenizer(encoder, m["image_tokenizer"], rngs=rngs)
        if "unet" in m:
            self.unet = UNet(m["unet"], rngs=rngs)
        if "vae" in m:
            self.vae = VAE(m["vae"], rngs=rngs)
        if "conditioner" in m:
            self.conditioner = Conditioner(encoder.width, encoder.num_patches, m["conditioner"], rngs=rngs)
        if "pixel_decoder" in m:
            self.pixel_decoder = PixelDecoder(m["pixel_decoder"], encoder.width, encoder.patch_size, rngs=rngs)


class ImageDecoding(Objective):
    """Base class of the objectives that train a decoder from codes to pixels.

    Batch: images uint8 [B, H, W, 3], codes int32 [B, P], keep boolean [B, P].
    """

    sections: ClassVar[dict[str, type]] = {"encoder": ViTConfig, "image_tokenizer": ImageTokenizerConfig}
    data_config = RecordDataConfig
    accumulates = True
    size_unit = 0  # width and height of generated images must be multiples of it; 0 allows the configured size only
    latent = False  # whether the clean signal is the latents of an autoencoder

    def __init__(self, config: Config, data: pipeline.Input):
        super().__init__(config, data, lambda rngs: ImageDecoder(config.model, rngs=rngs))
        self.decode = jax.jit(self._decode, static_argnames="size")

    @classmethod
    def open_input(
        cls, config: Config, text_tokenizer: TextTokenizer | None = None, split: str = "train"
    ) -> pipeline.Input:
        """See `Objective.open_input`."""
        return pipeline.record_input(config, split)

    @classmethod
    def abstract_input(cls, config: Config, text_rows: int = 32_000, codes: int = 16_384) -> pipeline.Input:
        """See `Objective.abstract_input`."""
        return pipeline.Input(None)

    @classmethod
    def batch_spec(cls, config: Config, rows: int = 0) -> BatchSpec:
        """See `Objective.batch_spec`."""
        shape = (rows or config.train.batch_size, config.model["encoder"].num_patches)
        spec = image_spec(config, rows, config.data.pixel_size)
        return spec | {"codes": (shape, np.dtype(np.int32)), "keep": (shape, np.dtype(bool))}

    def features(self, model: Any, batch: Batch) -> jax.Array:
        """Reconstructed features [B, P, D] of the batch's codes in the activation dtype, without gradient."""
        return jax.lax.stop_gradient(model.image_tokenizer.decode(batch["codes"], batch["keep"], self.dtype))

    def _decode(
        self, params: Tree, codes: jax.Array, keep: jax.Array, key: jax.Array, size: tuple[int, int] | None = None
    ) -> jax.Array:
        """Codes and keep masks [B, P] → uint8 [B, H, W, 3]; `size` is (H, W), or None for the configured size."""
        raise NotImplementedError

    def visualize(self, params: Tree, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Up to 8 images of the batch in the first row, their reconstructions in the second."""
        decoded = np.asarray(self.decode(params, batch["codes"][:8], batch["keep"][:8], jax.random.key(0)))
        return {"reconstructions": grid([*batch["images"][:8], *decoded], 8)}


def to_uint8(x: jax.Array) -> jax.Array:
    """Pixels in [0, 1] → uint8, clipped and rounded."""
    return (jnp.clip(x, 0, 1) * 255 + 0.5).astype(jnp.uint8)
