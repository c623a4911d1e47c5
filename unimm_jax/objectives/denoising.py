"""The detokenizer stages: features reconstructed from codes become pixels, by a U-Net or directly."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from unimm_jax.metrics import grid
from unimm_jax.models.conditioner import Conditioner
from unimm_jax.models.denoiser import UNet, add_noise, alphas, ddim, pixel_shuffle, pixel_unshuffle
from unimm_jax.models.pixel_decoder import PixelDecoder
from unimm_jax.models.tokenizer import VisualTokenizer
from unimm_jax.models.vae import VAE
from unimm_jax.objectives.base import Aux, Objective, models


class Detokenizer(nnx.Module):
    """The frozen tokenizer and what draws: `unet`, alone or with `vae` and `conditioner`, or `direct`."""

    def __init__(self, m: dict[str, Any], *, rngs: nnx.Rngs):
        self.tokenizer = VisualTokenizer(m["encoder"], m["tokenizer"], rngs=rngs)
        if "unet" in m:
            self.unet = UNet(m["unet"], rngs=rngs)
        if "vae" in m:
            self.vae = VAE(m["vae"], rngs=rngs)
        if "conditioner" in m:
            self.conditioner = Conditioner(m["encoder"].width, m["encoder"].patches, m["conditioner"], rngs=rngs)
        if "pixel_decoder" in m:
            e = m["encoder"]
            self.direct = PixelDecoder(m["pixel_decoder"], e.width, e.patch_size, rngs=rngs)


class _FromCodes(Objective):
    """Batch: images uint8 [B, H, W, 3], codes int32 [B, P], keep boolean [B, P]."""

    @property
    def latent(self) -> bool:
        """Whether the clean signal is an autoencoder's latents."""
        return "vae" in self.config.model

    @property
    def size_unit(self) -> int:
        """What width and height of a drawn picture must be multiples of; 0 where one size is drawn."""
        return 0

    def __init__(self, config: Any, data: Any):
        m = models(config)
        super().__init__(config, data, lambda r: Detokenizer(m, rngs=r))
        self.draw = jax.jit(self._draw, static_argnames="size")

    def features(self, model: Any, batch: Any) -> jax.Array:
        """Reconstructed features of the batch's codes, without gradient."""
        return jax.lax.stop_gradient(model.tokenizer.decode(batch["codes"], batch["keep"])).astype(self.dtype)

    def _draw(self, params, codes, keep, key, size=None) -> jax.Array:
        """Codes → pixels, uint8 [B, H, W, 3]."""
        raise NotImplementedError

    def pictures(self, params, batch):
        """Pictures above, what their codes decode to below."""
        drawn = np.asarray(self.draw(params, batch["codes"][:8], batch["keep"][:8], jax.random.key(0)))
        return {"reconstructions": grid([*batch["images"][:8], *drawn], 8)}


def to_uint8(x: jax.Array) -> jax.Array:
    """[0, 1] → uint8."""
    return (jnp.clip(x, 0, 1) * 255 + 0.5).astype(jnp.uint8)


class PixelDecoding(_FromCodes):
    """Direct decoding: L1 + 2 MSE on pixels in [0, 1]."""

    def loss(self, params, batch, key, step):
        """The stage's loss; see `Objective.loss`."""
        model = self.module(params)
        found = model.direct(self.features(model, batch)).astype(jnp.float32)
        gap = found - batch["images"].astype(jnp.float32) / 255
        mse = (gap * gap).mean()
        return jnp.abs(gap).mean() + 2 * mse, Aux({"pixel_mse": mse})

    def _draw(self, params, codes, keep, key, size=None):
        model = self.module(params)
        return to_uint8(model.direct(self.features(model, {"codes": codes, "keep": keep})))


class Denoising(_FromCodes):
    """Diffusion conditioned on the features x_rec (LaVIT §3.1), in pixel space or in the latents of an autoencoder.

    With `config.model.vae` the clean signal is the latents of that frozen autoencoder, else pixels, `unshuffle` of
    them a side turned into channels. With `config.model.conditioner` the U-Net reads projections of the features
    (and, SDXL, a pooled vector and the picture's size), else the features themselves. `config.loss.prediction` is
    what the network gives: "epsilon", the noise (LaVIT, Stable Diffusion), or "sample", the clean picture, with which
    a narrow network need not pass the noise through. The context is replaced by the negative for
    `config.loss.context_dropout` of the pictures, for guidance.
    """

    def loss(self, params, batch, key, step):
        """The stage's loss; see `Objective.loss`."""
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
        conditions = jax.tree.map(lambda free, own: jnp.where(_like(dropped, own), free, own), *conditions)
        noisy = add_noise(x, noise, steps).astype(self.dtype)
        found = model.unet(noisy, steps, *conditions, remat=c.remat).astype(jnp.float32)
        loss = ((found - (noise if c.prediction == "epsilon" else x)) ** 2).mean()
        return loss, Aux({})

    @property
    def size_unit(self) -> int:
        """What width and height of a drawn picture must be multiples of."""
        m = models(self.config)
        halvings = 2 ** (len(m["unet"].block_out_channels) - 1)
        return halvings * (2 ** (len(m["vae"].block_out_channels) - 1) if self.latent else self.config.loss.unshuffle)

    def _conditions(self, model, features_BPD, size):
        """What the U-Net reads without and with the picture: two tuples (context, pooled, sizes, mask), None for parts
        that it does not take."""
        b = features_BPD.shape[0]
        if "conditioner" not in self.config.model:
            return (jnp.zeros_like(features_BPD), None, None, None), (features_BPD, None, None, None)
        context, pooled = model.conditioner(features_BPD)
        nothing, mask = model.conditioner.negative(context)
        sizes = None
        if pooled is not None:
            sizes = jnp.broadcast_to(jnp.array([*size, 0, 0, *size], jnp.float32), (b, 6))
        no_pooled = None if pooled is None else jnp.zeros_like(pooled)
        return (nothing, no_pooled, sizes, mask), (context, pooled, sizes, jnp.ones_like(mask))

    def _draw(self, params, codes, keep, key, size=None):
        """Codes → pixels uint8 [B, H, W, 3]; `size` is (H, W), the configured one if None."""
        model, c = self.module(params), self.config.loss
        data = self.config.data
        height, width = size or (data.get("pixel_size", 0) or data.image_size,) * 2
        features = self.features(model, {"codes": codes, "keep": keep})
        free, own = self._conditions(model, features, (height, width))
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), own, free)

        def predict(x, t):
            found = model.unet(jnp.concatenate([x, x]).astype(self.dtype), jnp.concatenate([t, t]), *both)
            conditional, free = jnp.split(found.astype(jnp.float32), 2)
            guided = free + c.guidance * (conditional - free)
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
    """Flags with as many axes as an array."""
    return flags_B.reshape(-1, *(1,) * (array.ndim - 1))
