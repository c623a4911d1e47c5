"""The detokenizer stages: features reconstructed from codes become pixels, by a U-Net or directly."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from unimm_jax.metrics import grid
from unimm_jax.models.denoiser import UNet, add_noise, alphas, ddim, pixel_shuffle, pixel_unshuffle
from unimm_jax.models.pixel_decoder import PixelDecoder
from unimm_jax.models.tokenizer import VisualTokenizer
from unimm_jax.objectives.base import Aux, Objective, models


class Detokenizer(nnx.Module):
    """The frozen tokenizer and what draws from its features: `unet` or `direct`."""

    def __init__(self, m: dict[str, Any], *, rngs: nnx.Rngs):
        self.tokenizer = VisualTokenizer(m["encoder"], m["tokenizer"], rngs=rngs)
        if "unet" in m:
            self.unet = UNet(m["unet"], rngs=rngs)
        if "pixel_decoder" in m:
            e = m["encoder"]
            self.direct = PixelDecoder(m["pixel_decoder"], e.width, e.patch_size, rngs=rngs)


class _FromCodes(Objective):
    """Batch: images uint8 [B, H, W, 3], codes int32 [B, P], keep boolean [B, P]."""

    def __init__(self, config: Any, data: Any):
        m = models(config)
        super().__init__(config, lambda r: Detokenizer(m, rngs=r))
        self.draw = jax.jit(self._draw)

    def features(self, model: Any, batch: Any) -> jax.Array:
        """Reconstructed features of the batch's codes, without gradient."""
        return jax.lax.stop_gradient(model.tokenizer.decode(batch["codes"], batch["keep"])).astype(self.dtype)

    def _draw(self, params, codes, keep, key) -> jax.Array:
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

    def _draw(self, params, codes, keep, key):
        model = self.module(params)
        return to_uint8(model.direct(self.features(model, {"codes": codes, "keep": keep})))


class Denoising(_FromCodes):
    """Diffusion conditioned on the features x_rec (LaVIT §3.1), in pixel space.

    `config.loss.prediction` is what the network gives: "epsilon", the noise (LaVIT, Stable Diffusion), or "sample", the
    clean picture, with which a narrow network need not pass the noise through. The context is dropped (zeros) for
    `config.loss.context_dropout` of the pictures, for guidance.
    """

    def loss(self, params, batch, key, step):
        """The stage's loss; see `Objective.loss`."""
        model, c = self.module(params), self.config.loss
        k1, k2, k3 = jax.random.split(key, 3)
        x = pixel_unshuffle(batch["images"].astype(jnp.float32) / 127.5 - 1, c.unshuffle)
        noise = jax.random.normal(k1, x.shape)
        steps = jax.random.randint(k2, (x.shape[0],), 0, 1000)
        context = self.features(model, batch)
        context = jnp.where(jax.random.bernoulli(k3, c.context_dropout, (x.shape[0], 1, 1)), 0, context)
        noisy = add_noise(x, noise, steps).astype(self.dtype)
        found = model.unet(noisy, steps, context).astype(jnp.float32)
        loss = ((found - (noise if c.prediction == "epsilon" else x)) ** 2).mean()
        return loss, Aux({})

    def _draw(self, params, codes, keep, key):
        model, c = self.module(params), self.config.loss
        context = self.features(model, {"codes": codes, "keep": keep})
        both = jnp.concatenate([context, jnp.zeros_like(context)])
        side = self.config.data.image_size // c.unshuffle

        def predict(x, t):
            found = model.unet(jnp.concatenate([x, x]).astype(self.dtype), jnp.concatenate([t, t]), both)
            conditional, free = jnp.split(found.astype(jnp.float32), 2)
            guided = free + c.guidance * (conditional - free)
            a = jnp.asarray(alphas())[t][:, None, None, None]
            return guided if c.prediction == "epsilon" else (x - jnp.sqrt(a) * guided) / jnp.sqrt(1 - a)

        noise = jax.random.normal(key, (codes.shape[0], side, side, 3 * c.unshuffle**2))
        return to_uint8((pixel_shuffle(ddim(predict, noise, c.sampling_steps, clip=1.0), c.unshuffle) + 1) / 2)
