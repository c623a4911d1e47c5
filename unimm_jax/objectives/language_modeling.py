"""The language stages: next-token prediction over packed rows of text, picture features and codes (LaVIT Eq. 6)."""

from typing import Any

import jax
import jax.numpy as jnp

from unimm_jax.models.unified import UnifiedModel
from unimm_jax.models.vit import normalize_pixels
from unimm_jax.objectives.base import Aux, Objective, models


def chunked_cross_entropy(
    hidden_MD: jax.Array, head_VD: jax.Array, targets_M: jax.Array, used: int, chunk: int
) -> jax.Array:
    """Cross-entropy of each position, float32 [M], never holding more than `chunk` rows of logits.

    Args:
      used: ids from here on are padding of the vocabulary and cannot win.
      chunk: rows at a time; logits are recomputed in the backward pass. 0 or at least M does all at once.
    """

    def of(hidden, targets):
        logits = jnp.einsum("md,vd->mv", hidden, head_VD, preferred_element_type=jnp.float32)
        logits = jnp.where(jnp.arange(head_VD.shape[0]) < used, logits, -1e30)
        hit = jnp.take_along_axis(logits, targets[:, None], 1)[:, 0]
        return jax.nn.logsumexp(logits, -1) - hit

    size = hidden_MD.shape[0]
    if not chunk or size <= chunk:
        return of(hidden_MD, targets_M)
    pad = -size % chunk
    hidden = jnp.pad(hidden_MD, ((0, pad), (0, 0))).reshape(-1, chunk, hidden_MD.shape[1])
    targets = jnp.pad(targets_M, (0, pad)).reshape(-1, chunk)
    step = jax.checkpoint(lambda _, x: (None, of(*x)))
    return jax.lax.scan(step, None, (hidden, targets))[1].reshape(-1)[:size]


class LanguageModeling(Objective):
    """Batch: packed rows as `unimm_jax.data.packing.build_row` lays them out, with a leading [B]."""

    def __init__(self, config: Any, data: Any):
        m = models(config)
        v = self.vocabulary = data.vocabulary
        self.used = v.first_position + v.patches

        def make(rngs):
            return UnifiedModel(
                m["encoder"],
                m["tokenizer"],
                m["language"],
                m["unified"],
                text_rows=v.text,
                visual_rows=v.visual_rows,
                rngs=rngs,
            )

        super().__init__(config, make)

    def init(self, key):
        """Fresh parameters. Ids of patch positions start as the sum of a row's and a column's vector, so that left and
        above are directions from the first step on."""
        params = super().init(key)
        v = self.vocabulary
        if v.patches:
            side = round(v.patches**0.5)
            for name in {"embed_visual", "head_visual"} & set(params["language"]):  # a tied model has no head
                table = params["language"][name]
                lines = table[2 + v.codes : 2 + v.codes + 2 * side]
                grid = (lines[:side, None] + lines[None, side : 2 * side]).reshape(v.patches, -1)
                params["language"][name] = table.at[2 + v.codes : 2 + v.codes + v.patches].set(grid)
        return params

    def cross_entropy(self, params: Any, batch: Any) -> jax.Array:
        """Cross-entropy of every position's target, float32 [B, T], weights not applied."""
        model = self.module(params)
        b, t = batch["tokens"].shape
        images, keep = batch["images"], batch["keep"]
        if images.shape[1]:
            rows = model.features(
                normalize_pixels(images.reshape(-1, *images.shape[2:]), self.dtype), keep.reshape(-1, keep.shape[-1])
            )
            x_BTD = model.inputs(batch["tokens"], batch["feature_index"], rows.reshape(b, -1, *rows.shape[1:]))
        else:
            x_BTD = model.language.embed(batch["tokens"], self.dtype)
        hidden_BTD = model.language(x_BTD, batch["positions"], batch["segments"])
        head = model.language.head(self.dtype)
        flat = hidden_BTD.reshape(b * t, -1)
        chunk = self.config.loss.chunk
        return chunked_cross_entropy(flat, head, batch["targets"].reshape(-1), self.used, chunk).reshape(b, t)

    def loss(self, params, batch, key, step):
        """The stage's loss; see `Objective.loss`."""
        ce_BT = self.cross_entropy(params, batch)
        weights = batch["weights"]
        visual = batch["targets"] >= self.vocabulary.text
        mean = lambda w: (ce_BT * w).sum() / jnp.maximum(w.sum(), 1e-6)
        metrics = {
            "text_ce": mean(weights * ~visual),
            "code_ce": mean(weights * visual),
            "fill": (batch["segments"] > 0).mean(),
        }
        return mean(weights), Aux(metrics)
