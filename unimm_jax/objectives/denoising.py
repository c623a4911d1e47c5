"""The U-Net decoder stage: diffusion from reconstructed features to pixels (LaVIT §3.1)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from unimm_jax.config import Config, one_of, ranged
from unimm_jax.data import pipeline
from unimm_jax.models.conditioner import ConditionerConfig
from unimm_jax.models.denoiser import UNetConfig, add_noise, alphas, ddim, pixel_shuffle, pixel_unshuffle
from unimm_jax.models.vae import VAEConfig
from unimm_jax.objectives.base import Aux, Batch, Tree
from unimm_jax.objectives.image_decoding import ImageDecoding, to_uint8


@dataclasses.dataclass(frozen=True)
class DenoisingLossConfig:
    """Diffusion settings.

    Attributes:
      unshuffle: in pixel space, side of the pixel blocks that are moved to channels.
      prediction: "epsilon" predicts the noise (LaVIT, Stable Diffusion); "sample" predicts the clean image, so that a
        narrow network need not represent the noise.
      context_dropout: share of the images whose context is replaced by the negative context, for guidance.
      guidance: scale of classifier-free guidance; 1 is none.
      sampling_steps: number of DDIM steps.
      remat: what the U-Net's blocks recompute in the backward pass, a name of `models.transformer.REMAT`.
    """

    unshuffle: int = ranged(1, low=1)
    prediction: str = one_of("epsilon", "epsilon", "sample")
    context_dropout: float = ranged(0.1, low=0, high=1)
    guidance: float = ranged(1.5, low=0)
    sampling_steps: int = ranged(20, low=1, high=1000)
    remat: str = one_of("none", "none", "full", "dots", "attention")


class Denoising(ImageDecoding):
    """Diffusion conditioned on reconstructed features (LaVIT §3.1), in pixel space or in the latents of an autoencoder.

    With `config.model.vae` the clean signal is the latents of that frozen autoencoder, otherwise pixels. With
    `config.model.conditioner` the context is projections of the features (for SDXL also a pooled vector and the image
    size), otherwise the features themselves. Batch: see `ImageDecoding`.
    """

    sections = ImageDecoding.sections | {"unet": UNetConfig}
    optional_sections = {"vae": VAEConfig, "conditioner": ConditionerConfig}
    loss_config = DenoisingLossConfig

    def __init__(self, config: Config, data: pipeline.Input):
        super().__init__(config, data)
        m = config.model
        self.latent = "vae" in m
        halvings = 2 ** (len(m["unet"].block_out_channels) - 1)
        self.size_unit = halvings * (
            2 ** (len(m["vae"].block_out_channels) - 1) if self.latent else config.loss.unshuffle
        )

    def loss(self, params: Tree, batch: Batch, key: jax.Array, step: jax.Array) -> tuple[jax.Array, Aux]:
        """Mean squared error of the predicted noise or clean signal; see `Objective.loss`."""
        model, c = self.module(params), self.config.loss
        k1, k2, k3, k4 = jax.random.split(key, 4)
        pixels = batch["images"].astype(jnp.float32) / 127.5 - 1
        if self.latent:
            x = jax.lax.stop_gradient(model.vae.encode(pixels.astype(self.dtype), k4)).astype(jnp.float32)
        else:
            x = pixel_unshuffle(pixels, c.unshuffle)
        noise = jax.random.normal(k1, x.shape)
        steps = jax.random.randint(k2, (x.shape[0],), 0, 1000)
        dropped = jax.random.bernoulli(k3, c.context_dropout, (x.shape[0],))
        conditions = self._conditions(model, self.features(model, batch), pixels.shape[1:3])
        conditions = jax.tree.map(lambda without, given: jnp.where(_like(dropped, given), without, given), *conditions)
        noisy = add_noise(x, noise, steps).astype(self.dtype)
        found = model.unet(noisy, steps, *conditions, remat=c.remat).astype(jnp.float32)
        loss = ((found - (noise if c.prediction == "epsilon" else x)) ** 2).mean()
        return loss, Aux({})

    def _conditions(
        self, model: Any, features_BPD: jax.Array, size: tuple[int, ...]
    ) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Conditions of the U-Net without and with the image: two tuples (context, pooled, sizes, mask).

        Conditions that the U-Net does not use are None.

        Args:
          features_BPD: reconstructed features.
          size: (height, width) of the image in pixels.
        """
        b = features_BPD.shape[0]
        if "conditioner" not in self.config.model:
            return (jnp.zeros_like(features_BPD), None, None, None), (features_BPD, None, None, None)
        context, pooled = model.conditioner(features_BPD)
        negative, mask = model.conditioner.negative(context)
        sizes = None
        if pooled is not None:
            sizes = jnp.broadcast_to(jnp.array([*size, 0, 0, *size], jnp.float32), (b, 6))
        no_pooled = None if pooled is None else jnp.zeros_like(pooled)
        return (negative, no_pooled, sizes, mask), (context, pooled, sizes, jnp.ones_like(mask))

    def _decode(
        self, params: Tree, codes: jax.Array, keep: jax.Array, key: jax.Array, size: tuple[int, int] | None = None
    ) -> jax.Array:
        model, c = self.module(params), self.config.loss
        data = self.config.data
        height, width = size or (data.pixel_size or data.image_size,) * 2
        features = self.features(model, {"codes": codes, "keep": keep})
        without, given = self._conditions(model, features, (height, width))
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), given, without)

        def predict(x: jax.Array, t: jax.Array) -> jax.Array:
            found = model.unet(jnp.concatenate([x, x]).astype(self.dtype), jnp.concatenate([t, t]), *both)
            conditional, unconditional = jnp.split(found.astype(jnp.float32), 2)
            guided = unconditional + c.guidance * (conditional - unconditional)
            a = jnp.asarray(alphas())[t][:, None, None, None]
            return guided if c.prediction == "epsilon" else (x - jnp.sqrt(a) * guided) / jnp.sqrt(1 - a)

        if self.latent:
            shrink = 2 ** (len(model.vae.config.block_out_channels) - 1)
            shape = (codes.shape[0], height // shrink, width // shrink, model.vae.config.latent_channels)
            clean = ddim(predict, jax.random.normal(key, shape), c.sampling_steps)
            return to_uint8((model.vae.decode(clean).astype(jnp.float32) + 1) / 2)
        shape = (codes.shape[0], height // c.unshuffle, width // c.unshuffle, 3 * c.unshuffle**2)
        clean = ddim(predict, jax.random.normal(key, shape), c.sampling_steps, clip=1.0)
        return to_uint8((pixel_shuffle(clean, c.unshuffle) + 1) / 2)


def _like(flags_B: jax.Array, array: jax.Array) -> jax.Array:
    """Flags [B] reshaped to broadcast over the trailing axes of an array."""
    return flags_B.reshape(-1, *(1,) * (array.ndim - 1))
