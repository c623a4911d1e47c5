"""The encoder stage: InfoNCE between pictures and captions (CLIP) plus pixels from the patch features."""

from typing import Any

import jax
import jax.numpy as jnp

from unimm_jax.models.contrastive import ContrastiveModel
from unimm_jax.models.vit import normalize_pixels, patchify
from unimm_jax.objectives.base import Aux, Objective, models


class Contrastive(Objective):
    """Batch: images uint8 [B, H, W, 3], tokens int32 [B, T], valid boolean [B, T]."""

    def __init__(self, config: Any, data: Any):
        m = models(config)
        self.encoder = m["encoder"]
        size = data.tokenizer.size
        super().__init__(config, data, lambda r: ContrastiveModel(m["encoder"], m["text_tower"], size, rngs=r))

    def loss(self, params, batch, key, step):
        """The stage's loss; see `Objective.loss`."""
        model = self.module(params)
        pixels = normalize_pixels(batch["images"], self.dtype)
        features = model.encoder(pixels)
        image, text = model.image_embedding(features), model.text_embedding(batch["tokens"], batch["valid"])
        logits = jnp.exp(jnp.minimum(model.log_scale[...], jnp.log(100.0))) * image @ text.T
        same = (batch["tokens"][:, None] == batch["tokens"][None]).all(-1)  # equal captions share the target
        target = same / same.sum(-1, keepdims=True)
        ce = -(target * jax.nn.log_softmax(logits, -1)).sum(-1).mean()
        ce = (ce - (target * jax.nn.log_softmax(logits.T, -1)).sum(-1).mean()) / 2
        patches = patchify(pixels, self.encoder.patch_size).astype(jnp.float32)
        mse = jnp.mean((model.pixel_head(features).astype(jnp.float32) - patches) ** 2)
        hit = jnp.take_along_axis(same, logits.argmax(-1)[:, None], 1).mean()
        loss = ce + self.config.loss.pixel_weight * mse
        return loss, Aux({"contrastive": ce, "pixel_mse": mse, "retrieval": hit})
