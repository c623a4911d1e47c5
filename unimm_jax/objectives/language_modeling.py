"""The language stages: next-token prediction over packed rows of text, picture features and codes (LaVIT Eq. 6)."""

from typing import Any

import jax
import jax.numpy as jnp

from unimm_jax.models.layout import constrain
from unimm_jax.models.transformer import linear
from unimm_jax.models.unified import UnifiedModel
from unimm_jax.models.vit import normalize_pixels
from unimm_jax.objectives.base import Aux, Objective, models


def chunked_cross_entropy(
    hidden_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array, used: int, chunk: int
) -> jax.Array:
    """Cross-entropy of each position, float32 [B, T], never holding logits of more than `chunk` positions of a row.

    Args:
      used: ids from here on are padding of the vocabulary and cannot win.
      chunk: positions of every row at a time (rows stay where they are on the mesh); logits are recomputed in the
        backward pass. 0 or at least T does all at once.
    """

    def of(hidden, targets):
        logits = linear(hidden, head_VD.T, jnp.float32)
        logits = constrain(logits, "batch", None, "vocab")
        ids = jnp.arange(head_VD.shape[0])
        logits = jnp.where(ids < used, logits, -1e30)
        # the target's logit by comparison: the gradient of a look-up is a scatter into an array of logits
        hit = jnp.where(ids == targets[..., None], logits, 0).sum(-1)
        return jax.nn.logsumexp(logits, -1) - hit

    b, t, d = hidden_BTD.shape
    if not chunk or t <= chunk:
        return of(hidden_BTD, targets_BT)
    pad = -t % chunk
    hidden = jnp.pad(hidden_BTD, ((0, 0), (0, pad), (0, 0))).reshape(b, -1, chunk, d).swapaxes(0, 1)
    targets = jnp.pad(targets_BT, ((0, 0), (0, pad))).reshape(b, -1, chunk).swapaxes(0, 1)
    step = jax.checkpoint(lambda _, x: (None, of(*x)))
    return jax.lax.scan(step, None, (hidden, targets))[1].swapaxes(0, 1).reshape(b, -1)[:, :t]


class LanguageModeling(Objective):
    """Batch: packed rows as `unimm_jax.data.packing.build_row` lays them out, with a leading [B]."""

    def __init__(self, config: Any, data: Any):
        m = models(config)
        v = self.vocabulary = data.vocabulary
        self.used = v.first_position + v.patches

        def make(rngs):
            return UnifiedModel(
                m["encoder"] if config.data.row_pictures else None,
                m["tokenizer"],
                m["language"],
                m["unified"],
                text_rows=v.text,
                visual_rows=v.visual_rows,
                rngs=rngs,
            )

        super().__init__(config, data, make)

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
        b = batch["tokens"].shape[0]
        images, keep = batch["images"], batch["keep"]
        if images.shape[1]:
            rows = model.features(
                normalize_pixels(images.reshape(-1, *images.shape[2:]), self.dtype), keep.reshape(-1, keep.shape[-1])
            )
            x_BTD = model.inputs(batch["tokens"], batch["feature_index"], rows.reshape(b, -1, *rows.shape[1:]))
        else:
            x_BTD = model.language.embed(batch["tokens"], self.dtype)
        hidden_BTD = model.language(x_BTD, batch["positions"], batch["segments"])
        head_VD = model.language.head(self.dtype)  # gathered once, not in every chunk
        return chunked_cross_entropy(hidden_BTD, head_VD, batch["targets"], self.used, self.config.loss.chunk)

    def amounts(self, batch):
        """Rows, pictures that are read, positions that are not padding."""
        pictures = int(batch["images"].any((2, 3, 4)).sum()) if batch["images"].size else 0
        return {"examples": len(batch["tokens"]), "images": pictures, "tokens": int((batch["segments"] > 0).sum())}

    def step_flops(self, batch):
        """The formulae of the parts: what trains costs three forward passes, what lies after it two, the rest one."""
        m, trained = models(self.config), self.trained_parts()
        b, t = batch["tokens"].shape
        pictures, encoder, way_in = b * batch["images"].shape[1], m["encoder"], m["unified"]
        merges = way_in.way_in == "merger"
        rows = way_in.budget if merges else encoder.patches
        inner = 0 if merges else 2 * rows * encoder.width * m["language"].width
        adapter = inner + 2 * rows * (encoder.width if merges else m["language"].width) * m["language"].width
        forward = {
            "encoder": pictures * encoder.flops,
            "merger": pictures * merges * m["tokenizer"].merger_flops(encoder.width, rows, encoder.patches),
            "adapter": pictures * adapter,
            "language": b * t * m["language"].flops(t, self.vocabulary.size),
        }
        total, reached = 0.0, False
        for part, flops in forward.items():
            own = any(name.startswith(part) for name in trained)
            total += flops * (3 if own else 2 if reached else 1)
            reached = reached or own
        return total

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
