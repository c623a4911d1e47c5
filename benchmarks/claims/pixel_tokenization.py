"""Image tokenization by a pixel loss (as VQGAN's), the counterpart of ILLUME's feature loss.

The image tokenizer, its quantizer and its codebook update are those of `unimm_jax.objectives.tokenization`. What the
decoder reconstructs from the codes goes through a pixel decoder, and the loss is that of the pixel decoder stage: mean
absolute error + 2 × mean squared error. VQGAN's perceptual and adversarial losses are left out.

The phase "selector" trains without codes, as in the core. A pixel loss needs it: with codes from the first step on,
nearly all patches get the same code within twenty steps.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from unimm_jax.config import Config
from unimm_jax.data import pipeline
from unimm_jax.models.keys import Keys
from unimm_jax.models.pixel_decoder import PixelDecoder, PixelDecoderConfig
from unimm_jax.models.tokenizer import ImageTokenizer
from unimm_jax.objectives.base import Aux, Batch, Objective, Tree
from unimm_jax.objectives.tokenization import USED, Tokenization


class PixelTokenizer(ImageTokenizer):
    """An image tokenizer with a pixel decoder behind its decoder.

    Args (constructor):
      m: model sections of the config: name → dataclass.
    """

    def __init__(self, m: dict[str, Any], *, rngs: Keys):
        super().__init__(m["encoder"], m["image_tokenizer"], rngs=rngs)
        self.pixel_decoder = PixelDecoder(m["pixel_decoder"], m["encoder"].width, m["encoder"].patch_size, rngs=rngs)


class PixelTokenization(Tokenization):
    """Trains an image tokenizer by a pixel loss. Whether its encoder trains, too, is decided by the optimizer's rules.

    Batch: images uint8 [B, H, W, 3].
    """

    sections = Tokenization.sections | {"pixel_decoder": PixelDecoderConfig}

    def __init__(self, config: Config, data: pipeline.Input):
        super().__init__(config, data)
        Objective.__init__(self, config, data, lambda rngs: PixelTokenizer(config.model, rngs=rngs))

    @classmethod
    def check(cls, config: Config) -> list[str]:
        """See `Objective.check`."""
        codes = dataclasses.replace(
            config.loss, phase="codes"
        )  # without codes, it also trains bidirectional tokenizers
        return super().check(dataclasses.replace(config, loss=codes))

    def loss(self, params: Tree, batch: Batch, key: jax.Array, step: jax.Array) -> tuple[jax.Array, Aux]:
        """See `Tokenization.loss`; the features carry a gradient, and pixels are compared instead of features."""
        c, model = self.config.loss, self.module(params)
        x_BPD = model.features(model.encoder.normalize(batch["images"], self.dtype))
        keep_BP = model.decide(x_BPD, self._noise(x_BPD, key))
        weight_BP = keep_BP.astype(jnp.float32)
        z_BPC = model.project(x_BPD, keep_BP)
        if c.phase == "selector":
            loss, mse = self._pixel_loss(model, z_BPC.astype(x_BPD.dtype), keep_BP, batch)
            return loss, Aux({"pixel_mse": mse})
        fixed_BPC = jax.lax.stop_gradient(z_BPC)
        codes_BP = model.quantizer.lookup(fixed_BPC)
        rows_BPC = model.quantizer.rows(codes_BP)
        commit = (((z_BPC - jax.lax.stop_gradient(rows_BPC)) ** 2).mean(-1) * weight_BP).sum() / weight_BP.sum()
        straight_BPC = z_BPC + jax.lax.stop_gradient(rows_BPC - z_BPC)
        loss, mse = self._pixel_loss(model, straight_BPC.astype(x_BPD.dtype), keep_BP, batch)
        updates, hits = self._update_codebook(model, fixed_BPC, codes_BP, weight_BP, key)
        share, count = hits / hits.sum(), updates["quantizer/count"]
        metrics = {
            "pixel_mse": mse,
            "commitment": commit,
            "perplexity": jnp.exp(-(share * jnp.log(share + 1e-10)).sum()),
            "codebook_usage": (count > USED * count.mean()).mean(),
            "kept": weight_BP.sum(-1).mean(),
        }
        return loss + c.commitment * commit, Aux(metrics, updates)

    def _pixel_loss(
        self, model: PixelTokenizer, z_BPC: jax.Array, keep_BP: jax.Array, batch: Batch
    ) -> tuple[jax.Array, jax.Array]:
        """Loss of the pixels that are decoded from vectors [B, P, C], and their mean squared error."""
        found = model.pixel_decoder(model.reconstruct(z_BPC, keep_BP)).astype(jnp.float32)
        gap = found - batch["images"].astype(jnp.float32) / 255
        mse = (gap * gap).mean()
        return jnp.abs(gap).mean() + 2 * mse, mse


def image_tokenizer_config(config: Config) -> Config:
    """The config of the image tokenizer in a pixel tokenizer: that of the ordinary stage, without the pixel decoder."""
    model = {name: section for name, section in config.model.items() if name != "pixel_decoder"}
    return dataclasses.replace(config, objective="tokenization", model=model)
