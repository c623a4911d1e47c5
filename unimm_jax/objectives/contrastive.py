"""The encoder stage: InfoNCE between images and captions (CLIP) and pixel prediction from the patch features."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from unimm_jax import text_tokenizer as text_tokenizer_lib
from unimm_jax.config import Config, ImageDataConfig, ranged
from unimm_jax.data import pipeline
from unimm_jax.models.contrastive import ContrastiveModel, TextTowerConfig
from unimm_jax.models.vit import ViTConfig, patchify
from unimm_jax.objectives.base import Aux, Batch, BatchSpec, Objective, Tree, image_spec
from unimm_jax.text_tokenizer import TextTokenizer


@dataclasses.dataclass(frozen=True)
class ContrastiveLossConfig:
    """Loss = InfoNCE + `pixel_weight` × mean squared error of normalized pixels.

    Attributes:
      pixel_weight: weight of the pixel prediction.
    """

    pixel_weight: float = ranged(0.0, low=0)


class Contrastive(Objective):
    """Trains encoder and text tower. Batch: images uint8 [B, H, W, 3], tokens int32 [B, T], valid boolean [B, T]."""

    sections = {"encoder": ViTConfig, "text_tower": TextTowerConfig}
    data_config = ImageDataConfig
    loss_config = ContrastiveLossConfig

    def __init__(self, config: Config, data: pipeline.Input):
        m = config.model
        self.encoder: ViTConfig = m["encoder"]
        assert data.text_tokenizer is not None
        rows = data.text_tokenizer.num_rows
        super().__init__(config, data, lambda rngs: ContrastiveModel(m["encoder"], m["text_tower"], rows, rngs=rngs))

    @classmethod
    def open_input(
        cls, config: Config, text_tokenizer: TextTokenizer | None = None, split: str = "train"
    ) -> pipeline.Input:
        """See `Objective.open_input`."""
        datasets = pipeline.open_images(config.data, split, ("images", "captions"))
        if text_tokenizer is None:
            text_tokenizer = pipeline.make_text_tokenizer(config.text_tokenizer, datasets)
        return pipeline.image_input(config, datasets, text_tokenizer, config.model["text_tower"].max_length)

    @classmethod
    def abstract_input(cls, config: Config, text_rows: int = 32_000, codes: int = 16_384) -> pipeline.Input:
        """See `Objective.abstract_input`."""
        payload = text_tokenizer_lib.train(["a"], 300).payload | {"rows": text_rows}
        return pipeline.Input(None, text_tokenizer=TextTokenizer(payload))

    @classmethod
    def batch_spec(cls, config: Config, rows: int = 0) -> BatchSpec:
        """See `Objective.batch_spec`."""
        shape = (rows or config.train.batch_size, config.model["text_tower"].max_length)
        return image_spec(config, rows) | {"tokens": (shape, np.dtype(np.int32)), "valid": (shape, np.dtype(bool))}

    def loss(self, params: Tree, batch: Batch, key: jax.Array, step: jax.Array) -> tuple[jax.Array, Aux]:
        """See `Objective.loss`. Metrics: InfoNCE, pixel error, share of images whose nearest caption is right."""
        model = self.module(params)
        pixels = model.encoder.normalize(batch["images"], self.dtype)
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
