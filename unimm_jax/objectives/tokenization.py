"""The selector and tokenizer stages (LaVIT Eq. 4).

Eq. 4: L = mean over patches of (1 - cos(x, x_rec)) + lambda (rho - mean of M)^2. ILLUME's variant adds smooth L1 and
keeps all patches. Following the LaVIT authors, the selector stage trains selector, merger and feature decoder without
quantization; the tokenizer stage then trains the codes with a frozen selector. A bidirectional tokenizer (ILLUME) has
the tokenizer stage only.

Quantization adds commitment · mse(z, sg[q]) for the vectors z and their codes q, and with SimVQ mse(sg[z], q).
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
from unimm_jax.models.tokenizer.quantizer import code_hits, cosine_kmeans, ema_update, l2_normalize, restart_dead
from unimm_jax.models.tokenizer.selector import KEEP, argmax_mask, clip_mask_gradient, sample_mask
from unimm_jax.models.vit import ViTConfig
from unimm_jax.objectives.base import Aux, Batch, BatchSpec, Objective, Tree, image_spec
from unimm_jax.plotting import grid, kept_patches
from unimm_jax.text_tokenizer import TextTokenizer

USED = 0.01  # a code is in use if its EMA count exceeds this share of the mean count (of uniform use)
COLLAPSED = 0.05  # share of the largest possible perplexity below which training warns


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
      commitment: weight of the commitment loss (1 in BEiT-2, 0.25 in SimVQ).
      ema_decay: EMA decay of the codebook and of the counts of its codes.
      restart_below: EMA count below which a code is replaced by a vector of the batch; 0 is never (BEiT-2).
      restart_by: "uniform" draws these vectors with equal probabilities; "distance" with probabilities proportional to
        the fourth power of the distance from their code, so that frequent, well represented vectors get few codes.
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
    restart_by: str = one_of("uniform", "uniform", "distance")
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


def keep_rate_warning(rate: float, target: float) -> str | None:
    """A sentence if a keep rate, usually that of the argmax, differs from its target by more than a third of it."""
    if abs(rate - target) <= target / 3:
        return None
    return (
        f"the selector keeps {rate:.1%} of the patches, its target is {target:.1%}. It trains on sampled masks, and by "
        "default the argmax is used later: raise config.loss.binarization_weight in the selector stage, or set "
        "config.model.image_tokenizer.selection=sample in all stages"
    )


def collapse_warning(metrics: dict[str, float], settings: ImageTokenizerConfig, tokens: float) -> str | None:
    """A sentence if the perplexity is below `COLLAPSED` times the largest one that is possible.

    Args:
      metrics: `perplexity` and `codebook_usage`. tokens: per batch; the perplexity of a batch is at most their number.
    """
    codes, perplexity = settings.codes, metrics["perplexity"]
    largest = min(codes, tokens)
    if perplexity >= COLLAPSED * largest:
        return None
    remedies = ["lower config.optimizer.learning_rate", "use fewer codes (config.model.image_tokenizer.codes)"]
    if settings.quantizer == "ema":
        remedies.insert(0, "restart unused codes (config.loss.restart_below=0.05)")
    return (
        f"codebook collapse: {metrics['codebook_usage']:.1%} of the {codes} codes are used, with a perplexity of "
        f"{perplexity:.0f} of at most {largest:.0f}. Remedies: {', '.join(remedies)}"
    )


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
        m = config.model["image_tokenizer"]
        if c.phase == "selector" and m.architecture == "bidirectional":
            found.append("config.loss.phase is 'selector', but a bidirectional image tokenizer has none; use 'codes'")
        if c.restart_below and m.quantizer == "simvq":
            found.append(
                f"config.loss.restart_below is {c.restart_below}, but the codebook of simvq is frozen; set it to 0"
            )
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
        """See `Objective.loss`.

        Metrics of the "codes" phase that show how the codebook is used: `codebook_usage`, the share of codes whose EMA
        count exceeds `USED` times the mean count; `perplexity`, exp of the entropy of the codes of the batch.
        """
        c, model = self.config.loss, self.module(params)
        x_BPD = jax.lax.stop_gradient(model.features(model.encoder.normalize(batch["images"], self.dtype)))
        if c.phase == "selector":
            return self._selector_loss(model, x_BPD, key, step)
        keep_BP = model.decide(x_BPD, self._noise(x_BPD, key))
        weight_BP = keep_BP.astype(jnp.float32)
        z_BPC = model.project(x_BPD, keep_BP)
        codes_BP = model.quantizer.lookup(jax.lax.stop_gradient(z_BPC))
        rows_BPC = model.quantizer.rows(codes_BP)

        def mean_square(x_BPC: jax.Array) -> jax.Array:
            return ((x_BPC**2).mean(-1) * weight_BP).sum() / weight_BP.sum()

        commit = mean_square(z_BPC - jax.lax.stop_gradient(rows_BPC))
        straight_BPC = z_BPC + jax.lax.stop_gradient(rows_BPC - z_BPC)
        found_BPD = model.reconstruct(straight_BPC.astype(x_BPD.dtype), keep_BP)
        rec, cosine = reconstruction_loss(found_BPD, x_BPD, c.reconstruction)
        loss = rec + c.commitment * commit
        if self.settings.quantizer == "simvq":
            loss = loss + mean_square(jax.lax.stop_gradient(z_BPC) - rows_BPC)
        updates, hits = self._update_codebook(model, jax.lax.stop_gradient(z_BPC), codes_BP, weight_BP, key)
        share, count = hits / hits.sum(), updates["quantizer/count"]
        metrics = {
            "cosine": cosine,
            "commitment": commit,
            "perplexity": jnp.exp(-(share * jnp.log(share + 1e-10)).sum()),
            "codebook_usage": (count > USED * count.mean()).mean(),
            "kept": weight_BP.sum(-1).mean(),
        }
        return loss, Aux(metrics, updates)

    def _noise(self, x_BPD: jax.Array, key: jax.Array) -> jax.Array | None:
        """Noise for `ImageTokenizer.decide` in training: features [B, P, D] → float32 [B, P], or None."""
        if self.settings.selection != "sample":
            return None
        return jax.random.uniform(jax.random.fold_in(key, 1), x_BPD.shape[:2])

    def _update_codebook(
        self, model: ImageTokenizer, z_BPC: jax.Array, codes_BP: jax.Array, weight_BP: jax.Array, key: jax.Array
    ) -> tuple[dict[str, jax.Array], jax.Array]:
        """The next values of the parameters in `non_gradient_params`, and how often the batch hits each code [K]."""
        c, book, count = self.config.loss, model.quantizer.codebook[...], model.quantizer.count[...]
        z_MC, ids_M, weight_M = z_BPC.reshape(-1, z_BPC.shape[-1]), codes_BP.reshape(-1), weight_BP.reshape(-1)
        if self.settings.quantizer == "simvq":  # the codebook is frozen
            hits = code_hits(ids_M, weight_M, len(count))
            return {"quantizer/count": count * c.ema_decay + hits * (1 - c.ema_decay)}, hits
        book, count, hits = ema_update(book, count, z_MC, ids_M, weight_M, c.ema_decay)
        if c.restart_below:
            if c.restart_by == "distance":
                weight_M = weight_M * ((z_MC - model.quantizer.rows(ids_M)) ** 2).sum(-1) ** 2
            book, count = restart_dead(book, count, z_MC, weight_M, c.restart_below, key)
        return {"quantizer/codebook": book, "quantizer/count": count}, hits

    def warnings(self, step: int, metrics: dict[str, float]) -> dict[str, str]:
        """See `Objective.warnings`: a keep rate by argmax that is off its target, and codebook collapse."""
        c, done = self.config.loss, step / self.config.train.steps
        text = None
        if "keep_rate_argmax" in metrics:
            # compared in the second half of the run, once the target has not changed for a fifth of the run
            targets = np.interp([done - 0.2, done, 1.0], c.keep_rate_at, c.keep_rate)
            if done >= 0.5 and np.allclose(targets, targets[-1]):
                text = keep_rate_warning(metrics["keep_rate_argmax"], float(targets[-1]))
            return {"keep_rate": text} if text else {}
        if "perplexity" in metrics and done >= 0.5:  # a codebook can spread out late
            tokens = metrics["kept"] * self.config.train.batch_size
            text = collapse_warning(metrics, self.settings, tokens)
        return {"codebook": text} if text else {}

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
            assert model.selector is not None
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
        found_BPD = model.reconstruct(model.project(x_BPD, keep_BP).astype(x_BPD.dtype), keep_BP)
        rec, cosine = reconstruction_loss(found_BPD, x_BPD, c.reconstruction)
        return rec + extra, Aux({"cosine": cosine} | metrics)

    def _project(self, params: Tree, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Vectors before quantization [B, P, C] and keep masks [B, P]."""
        model = self.module(params)
        x_BPD = model.features(model.encoder.normalize(images, self.dtype))
        keep_BP = model.decide(x_BPD, self._noise(x_BPD, jax.random.key(self.config.seed)))
        return model.project(x_BPD, keep_BP), keep_BP

    def prepare(self, params: Tree, batches: Iterator[Batch]) -> Tree:
        """In the "codes" phase, initializes an EMA codebook by cosine k-means over the first batches."""
        if self.config.loss.phase != "codes" or self.settings.quantizer == "simvq":
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
        x_BPD = model.features(model.encoder.normalize(images, self.dtype))
        return model.decide(x_BPD, self._noise(x_BPD, jax.random.key(self.config.seed)))

    def visualize(self, params: Tree, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The kept patches of up to 16 images of the batch."""
        images = batch["images"][:16]
        keep = np.asarray(self._jitted_decide(params, images))
        return {"kept_patches": grid([kept_patches(i, k) for i, k in zip(images, keep, strict=True)], 8)}
