"""The tokenizer stages: first the selector with merger and decoder and no codes, then the codes (LaVIT Eq. 4).

Eq. 4: L = mean over patches of (1 - cos(x, x_rec)) + lambda (rho - mean of M)^2. ILLUME's variant adds smooth-L1 and
keeps every patch. The authors' order: predictor first, without quantization; then it is frozen and the codes train.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from unimm_jax.metrics import grid, kept_patches
from unimm_jax.models.tokenizer import VisualTokenizer
from unimm_jax.models.tokenizer.quantizer import cosine_kmeans, ema_update, l2_normalize, restart_dead
from unimm_jax.models.tokenizer.selector import KEEP, argmax_mask, clip_mask_gradient, sample_mask
from unimm_jax.models.vit import normalize_pixels
from unimm_jax.objectives.base import Aux, Objective, models


def reconstruction_loss(found: jax.Array, target: jax.Array, kind: str) -> tuple[jax.Array, jax.Array]:
    """(loss, mean cosine) of features [B, P, D]; `kind` is "cosine" (LaVIT) or "cosine+smooth_l1" (ILLUME)."""
    found, target = found.astype(jnp.float32), target.astype(jnp.float32)
    cosine = (l2_normalize(found) * l2_normalize(target)).sum(-1).mean()
    loss = 1 - cosine
    if kind == "cosine+smooth_l1":
        gap = jnp.abs(found - target)
        loss = loss + jnp.where(gap < 1, 0.5 * gap * gap, gap - 0.5).mean()
    return loss, cosine


class Tokenization(Objective):
    """Batch: images uint8 [B, H, W, 3]. `config.loss.phase` is "selector" or "codes"."""

    moved = frozenset({"quantizer/codebook", "quantizer/count"})

    def __init__(self, config: Any, data: Any):
        m = models(config)
        self.settings = m["tokenizer"]
        super().__init__(config, data, lambda r: VisualTokenizer(m["encoder"], m["tokenizer"], rngs=r))
        self._draw = jax.jit(self._reconstruct)
        self._projected = jax.jit(self._project)

    def loss(self, params, batch, key, step):
        """The stage's loss; see `Objective.loss`."""
        c, model = self.config.loss, self.module(params)
        x_BPD = jax.lax.stop_gradient(model.encoder(normalize_pixels(batch["images"], self.dtype)))
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

    def _selector_loss(self, model, x_BPD, key, step):
        c = self.config.loss
        if self.settings.selection == "all":
            keep_BP = jnp.ones(x_BPD.shape[:2])
            extra, metrics = 0.0, {}
        else:
            done = step / self.config.train.steps
            log_probs = model.selector(x_BPD)
            keep_BP = sample_mask(log_probs, key)
            target = jnp.interp(done, jnp.array(c.rate_at), jnp.array(c.rate))
            used_BP = keep_BP if c.rate_per_image else keep_BP.mean(keepdims=True)
            rate_loss = ((target - used_BP.mean(-1)) ** 2).mean()
            p_BP = jnp.exp(log_probs[..., KEEP])
            unsure = (p_BP * (1 - p_BP)).mean()
            hard_BP = argmax_mask(log_probs)
            extra = c.rate_weight * rate_loss + c.sureness * done**4 * unsure
            metrics = {
                "rate_sampled": keep_BP.mean(),
                "rate_argmax": hard_BP.mean(),
                "rate_spread": hard_BP.mean(-1).std(),
                "unsure": unsure,
            }
            keep_BP = clip_mask_gradient(keep_BP, c.mask_gradient_clip)
        z_BPC = model.quantizer.project(model.merger.dense(x_BPD, keep_BP))
        index_BP = model.position_index(jax.lax.stop_gradient(keep_BP))
        found_BPD = model.decoder(z_BPC, index_BP, keep_BP)
        rec, cosine = reconstruction_loss(found_BPD, x_BPD, c.reconstruction)
        return rec + extra, Aux({"cosine": cosine} | metrics)

    def _project(self, params, images):
        model = self.module(params)
        x_BPD = model.encoder(normalize_pixels(images, self.dtype))
        keep_BP = model.decide(x_BPD)
        return model.quantizer.project(model.merger.dense(x_BPD, keep_BP)), keep_BP

    def prepare(self, params, batches):
        """Cosine k-means over the first batches gives the codebook (10 iterations), in the codes phase."""
        if self.config.loss.phase != "codes":
            return params
        codes = self.settings.codes
        found: list[np.ndarray] = []
        while sum(map(len, found)) < self.config.loss.kmeans_samples * codes:
            z_BPC, keep_BP = self._projected(params, next(batches)["images"])
            z, keep = multihost_utils.process_allgather((z_BPC, keep_BP), tiled=True)
            found.append(np.asarray(z)[np.asarray(keep)])
        z_MC = np.concatenate(found)
        start = z_MC[np.random.default_rng(self.config.seed).choice(len(z_MC), codes, replace=False)]
        means, hits = jax.jit(cosine_kmeans)(jnp.asarray(z_MC), jnp.asarray(start))
        place = lambda old, new: jax.device_put(new.astype(old.dtype), old.sharding)
        book = params["quantizer"]
        params["quantizer"] = book | {
            "codebook": place(book["codebook"], means),
            "count": place(book["count"], hits / len(found)),
        }
        return params

    def _reconstruct(self, params, images):
        model = self.module(params)
        x_BPD = model.encoder(normalize_pixels(images, self.dtype))
        keep_BP = model.decide(x_BPD)
        return keep_BP

    def pictures(self, params, batch):
        """The kept patches of the first pictures."""
        images = batch["images"][:16]
        keep = np.asarray(self._draw(params, images))
        return {"kept_patches": grid([kept_patches(i, k) for i, k in zip(images, keep, strict=True)], 8)}
