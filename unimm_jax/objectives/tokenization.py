"""The selector and tokenizer stages (LaVIT Eq. 4).

Eq. 4: L = mean over patches of (1 - cos(x, x_rec)) + lambda (rho - mean of M)^2. ILLUME's variant adds smooth L1 and
keeps all patches. Following the LaVIT authors, the selector stage trains selector, merger and feature decoder without
quantization; the tokenizer stage then trains the codes with a frozen selector.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from unimm_jax.config import Config, ImageDataConfig, one_of, ranged
from unimm_jax.data import pipeline
from unimm_jax.models.tokenizer import ImageTokenizer, ImageTokenizerConfig
from unimm_jax.models.tokenizer.quantizer import cosine_kmeans, ema_update, l2_normalize, restart_dead
from unimm_jax.models.tokenizer.selector import KEEP, argmax_mask, clip_mask_gradient, sample_mask
from unimm_jax.models.vit import ViTConfig
from unimm_jax.objectives.base import Aux, Batch, BatchSpec, Objective, Tree, image_spec
from unimm_jax.plotting import grid, kept_patches
from unimm_jax.text_tokenizer import TextTokenizer


@dataclasses.dataclass(frozen=True)
class TokenizationLossConfig:
    """Loss of the selector and tokenizer stages.

    Attributes:
      phase: "selector" trains without codes, "codes" trains with codes and a frozen selector.
      reconstruction: "cosine" (LaVIT) or "cosine+smooth_l1" (ILLUME).
      keep_rate: target share of kept patches rho at each point of `keep_rate_at`, interpolated linearly between.
      keep_rate_at: points of the run as shares of its steps, ascending.
      keep_rate_weight: lambda.
      keep_rate_per_image: compare rho with the keep rate of each image instead of the mean over the batch.
      binarization_weight: weight of p (1 - p) for keep probabilities p, times the 4th power of the completed share of
        the run; makes the keep rates of sampling and argmax agree.
      mask_gradient_clip: bound of the gradient with respect to each element of the mask; 0 is off.
      commitment: weight of the commitment loss.
      ema_decay: EMA decay of the codebook.
      restart_below: EMA count below which a code is replaced by a vector of the batch; 0 is never (BEiT-2).
      kmeans_samples: vectors per code for the k-means initialization of the codebook.
    """

    phase: str = one_of("selector", "selector", "codes")
    reconstruction: str = one_of("cosine", "cosine", "cosine+smooth_l1")
    keep_rate_at: tuple[float, ...] = (0.0, 1.0)
    keep_rate: tuple[float, ...] = (1 / 3, 1 / 3)
    keep_rate_weight: float = ranged(2.0, low=0)
    keep_rate_per_image: bool = False
    binarization_weight: float = ranged(0.0, low=0)
    mask_gradient_clip: float = ranged(0.0, low=0)
    commitment: float = ranged(1.0, low=0)
    ema_decay: float = ranged(0.99, low=0, high=1)
    restart_below: float = ranged(0.0, low=0)
    kmeans_samples: int = ranged(8, low=1)


def reconstruction_loss(found: jax.Array, target: jax.Array, kind: str) -> tuple[jax.Array, jax.Array]:
    """Reconstruction loss of features: (loss, mean cosine similarity), float32 scalars.

    Args:
      found, target: features [B, P, D].
      kind: "cosine" (LaVIT) or "cosine+smooth_l1" (ILLUME).
    """
    found, target = found.astype(jnp.float32), target.astype(jnp.float32)
    cosine = (l2_normalize(found) * l2_normalize(target)).sum(-1).mean()
    loss = 1 - cosine
    if kind == "cosine+smooth_l1":
        gap = jnp.abs(found - target)
        loss = loss + jnp.where(gap < 1, 0.5 * gap * gap, gap - 0.5).mean()
    return loss, cosine


class Tokenization(Objective):
    """Trains the image tokenizer, in the phase `config.loss.phase`. Batch: images uint8 [B, H, W, 3]."""

    sections = {"encoder": ViTConfig, "image_tokenizer": ImageTokenizerConfig}
    data_config = ImageDataConfig
    loss_config = TokenizationLossConfig
    non_gradient_params = frozenset({"quantizer/codebook", "quantizer/count"})

    def __init__(self, config: Config, data: pipeline.Input):
        m = config.model
        self.settings: ImageTokenizerConfig = m["image_tokenizer"]
        super().__init__(config, data, lambda rngs: ImageTokenizer(m["encoder"], m["image_tokenizer"], rngs=rngs))
        self._jitted_decide = jax.jit(self._decide)
        self._jitted_project = jax.jit(self._project)

    @classmethod
    def check(cls, config: Config) -> list[str]:
        """See `Objective.check`."""
        c, found = config.loss, []
        if len(c.keep_rate) != len(c.keep_rate_at) or not c.keep_rate:
            found.append(
                f"config.loss.keep_rate has {len(c.keep_rate)} values and keep_rate_at {len(c.keep_rate_at)}; they "
                "need the same number, at least 1"
            )
        for name in ("keep_rate", "keep_rate_at"):
            if not all(0 <= value <= 1 for value in getattr(c, name)):
                found.append(f"config.loss.{name} is {getattr(c, name)}; its values must lie between 0 and 1")
        return found

    @classmethod
    def open_input(
        cls, config: Config, text_tokenizer: TextTokenizer | None = None, split: str = "train"
    ) -> pipeline.Input:
        """See `Objective.open_input`."""
        return pipeline.image_input(config, pipeline.open_images(config.data, split))

    @classmethod
    def abstract_input(cls, config: Config, text_rows: int = 32_000, codes: int = 16_384) -> pipeline.Input:
        """See `Objective.abstract_input`."""
        return pipeline.Input(None)

    @classmethod
    def batch_spec(cls, config: Config, rows: int = 0) -> BatchSpec:
        """See `Objective.batch_spec`."""
        return image_spec(config, rows)

    def loss(self, params: Tree, batch: Batch, key: jax.Array, step: jax.Array) -> tuple[jax.Array, Aux]:
        """See `Objective.loss`."""
        c, model = self.config.loss, self.module(params)
        x_BPD = jax.lax.stop_gradient(model.encoder(model.encoder.normalize(batch["images"], self.dtype)))
        if c.phase == "selector":
            return self._selector_loss(model, x_BPD, key, step)
        keep_BP = model.decide(x_BPD)
        z_BPC = model.quantizer.project(model.merger.dense(x_BPD, keep_BP))
        codes_BP = model.quantizer.lookup(jax.lax.stop_gradient(z_BPC))
        rows_BPC = model.quantizer.rows(codes_BP)
        weight_BP = keep_BP.astype(jnp.float32)
        commit = (((z_BPC - rows_BPC) ** 2).mean(-1) * weight_BP).sum() / weight_BP.sum()
        straight_BPC = z_BPC + jax.lax.stop_gradient(rows_BPC - z_BPC)
        found_BPD = model.decoder(straight_BPC, model.position_index(keep_BP), weight_BP)
        rec, cosine = reconstruction_loss(found_BPD, x_BPD, c.reconstruction)
        z_MC = jax.lax.stop_gradient(z_BPC).reshape(-1, z_BPC.shape[-1])
        book, count = model.quantizer.codebook[...], model.quantizer.count[...]
        book, count, hits = ema_update(book, count, z_MC, codes_BP.reshape(-1), weight_BP.reshape(-1), c.ema_decay)
        if c.restart_below:
            book, count = restart_dead(book, count, z_MC, weight_BP.reshape(-1), c.restart_below, key)
        share = hits / hits.sum()
        metrics = {
            "cosine": cosine,
            "commitment": commit,
            "perplexity": jnp.exp(-(share * jnp.log(share + 1e-10)).sum()),
            "codes_used": (count > c.restart_below).sum(),
            "kept": weight_BP.sum(-1).mean(),
        }
        updates = {"quantizer/codebook": book, "quantizer/count": count}
        return rec + c.commitment * commit, Aux(metrics, updates)

    def _selector_loss(
        self, model: ImageTokenizer, x_BPD: jax.Array, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, Aux]:
        """Loss of the "selector" phase for encoder features [B, P, D]."""
        c = self.config.loss
        if self.settings.selection == "all":
            keep_BP = jnp.ones(x_BPD.shape[:2])
            extra: Any = 0.0
            metrics: dict[str, jax.Array] = {}
        else:
            done = step / self.config.train.steps
            log_probs = model.selector(x_BPD)
            keep_BP = sample_mask(log_probs, key)
            target = jnp.interp(done, jnp.array(c.keep_rate_at), jnp.array(c.keep_rate))
            used_BP = keep_BP if c.keep_rate_per_image else keep_BP.mean(keepdims=True)
            rate_loss = ((target - used_BP.mean(-1)) ** 2).mean()
            p_BP = jnp.exp(log_probs[..., KEEP])
            uncertainty = (p_BP * (1 - p_BP)).mean()
            hard_BP = argmax_mask(log_probs)
            extra = c.keep_rate_weight * rate_loss + c.binarization_weight * done**4 * uncertainty
            metrics = {
                "keep_rate_sampled": keep_BP.mean(),
                "keep_rate_argmax": hard_BP.mean(),
                "keep_rate_spread": hard_BP.mean(-1).std(),
                "uncertainty": uncertainty,
            }
            keep_BP = clip_mask_gradient(keep_BP, c.mask_gradient_clip)
        z_BPC = model.quantizer.project(model.merger.dense(x_BPD, keep_BP))
        index_BP = model.position_index(jax.lax.stop_gradient(keep_BP))
        found_BPD = model.decoder(z_BPC, index_BP, keep_BP)
        rec, cosine = reconstruction_loss(found_BPD, x_BPD, c.reconstruction)
        return rec + extra, Aux({"cosine": cosine} | metrics)

    def _project(self, params: Tree, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Vectors before quantization [B, P, C] and keep masks [B, P]."""
        model = self.module(params)
        x_BPD = model.encoder(model.encoder.normalize(images, self.dtype))
        keep_BP = model.decide(x_BPD)
        return model.quantizer.project(model.merger.dense(x_BPD, keep_BP)), keep_BP

    def prepare(self, params: Tree, batches: Iterator[Batch]) -> Tree:
        """In the "codes" phase, initializes the codebook by cosine k-means over the first batches."""
        if self.config.loss.phase != "codes":
            return params
        codes = self.settings.codes
        found: list[np.ndarray] = []
        while sum(map(len, found)) < self.config.loss.kmeans_samples * codes:
            z_BPC, keep_BP = self._jitted_project(params, next(batches)["images"])
            z, keep = multihost_utils.process_allgather((z_BPC, keep_BP), tiled=True)
            found.append(np.asarray(z)[np.asarray(keep)])
        z_MC = np.concatenate(found)
        start = z_MC[np.random.default_rng(self.config.seed).choice(len(z_MC), codes, replace=False)]
        means, hits = jax.jit(cosine_kmeans)(jnp.asarray(z_MC), jnp.asarray(start))

        def put_like(old: jax.Array, new: jax.Array) -> jax.Array:
            return jax.device_put(new.astype(old.dtype), old.sharding)

        book = params["quantizer"]
        params["quantizer"] = book | {
            "codebook": put_like(book["codebook"], means),
            "count": put_like(book["count"], hits / len(found)),
        }
        return params

    def _decide(self, params: Tree, images: jax.Array) -> jax.Array:
        model = self.module(params)
        return model.decide(model.encoder(model.encoder.normalize(images, self.dtype)))

    def visualize(self, params: Tree, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The kept patches of up to 16 images of the batch."""
        images = batch["images"][:16]
        keep = np.asarray(self._jitted_decide(params, images))
        return {"kept_patches": grid([kept_patches(i, k) for i, k in zip(images, keep, strict=True)], 8)}
