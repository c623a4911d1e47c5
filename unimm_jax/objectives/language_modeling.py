"""The language stages: next-token prediction over packed rows of text, image features and codes (LaVIT Eq. 6)."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from unimm_jax import text_tokenizer as text_tokenizer_lib
from unimm_jax.config import TASKS, Config, PackedDataConfig, ranged, unknown
from unimm_jax.data import pipeline
from unimm_jax.data.packing import build_row
from unimm_jax.models.keys import Keys
from unimm_jax.models.language import LanguageConfig
from unimm_jax.models.partitioning import constrain
from unimm_jax.models.tokenizer import ImageTokenizerConfig
from unimm_jax.models.transformer import linear
from unimm_jax.models.unified import CONNECTORS, UnifiedConfig, UnifiedModel
from unimm_jax.models.vit import ViTConfig
from unimm_jax.objectives.base import Aux, Batch, BatchSpec, Objective, Tree
from unimm_jax.text_tokenizer import TextTokenizer
from unimm_jax.vocabulary import Vocabulary

# assumed where a batch is estimated without data: tokens of text per example, LaVIT's share of kept patches, and the
# share of positions that are not padding
TEXT_TOKENS, KEEP_RATE, FILL = 24, 1 / 3, 0.97


@dataclasses.dataclass(frozen=True)
class LanguageModelingLossConfig:
    """Settings of the cross-entropy.

    Attributes:
      chunk: positions per row whose logits are computed at a time, to save memory; 0 is all.
    """

    chunk: int = ranged(0, low=0)


def chunked_cross_entropy(
    hidden_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array, used: int, chunk: int
) -> jax.Array:
    """Cross-entropy per position, float32 [B, T], with logits of at most `chunk` positions per row in memory.

    Args:
      hidden_BTD: final hidden states.
      head_VD: output head.
      targets_BT: int32 target ids.
      used: number of ids in use; the probability of ids from `used` on (vocabulary padding) is 0.
      chunk: positions of every row at a time, so that the sharding of rows does not change; logits are recomputed in
        the backward pass. 0, or at least T, computes all at once.
    """

    def cross_entropy(hidden: jax.Array, targets: jax.Array) -> jax.Array:
        logits = linear(hidden, head_VD.T, jnp.float32)
        logits = constrain(logits, "batch", None, "vocab")
        ids = jnp.arange(head_VD.shape[0])
        logits = jnp.where(ids < used, logits, -1e30)
        # Select the target's logit by comparison: the gradient of indexing would be a scatter into an array of logits.
        hit = jnp.where(ids == targets[..., None], logits, 0).sum(-1)
        return jax.nn.logsumexp(logits, -1) - hit

    b, t, d = hidden_BTD.shape
    if not chunk or t <= chunk:
        return cross_entropy(hidden_BTD, targets_BT)
    pad = -t % chunk
    hidden = jnp.pad(hidden_BTD, ((0, 0), (0, pad), (0, 0))).reshape(b, -1, chunk, d).swapaxes(0, 1)
    targets = jnp.pad(targets_BT, ((0, 0), (0, pad))).reshape(b, -1, chunk).swapaxes(0, 1)

    def step(_: None, x: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        return None, cross_entropy(*x)

    return jax.lax.scan(jax.checkpoint(step), None, (hidden, targets))[1].swapaxes(0, 1).reshape(b, -1)[:, :t]


def _mixture_problems(mixture: tuple[dict[str, Any], ...]) -> list[str]:
    """A sentence for every wrong entry of `config.data.mixture`."""
    found = []
    for i, entry in enumerate(mixture):
        where = f"config.data.mixture[{i}]"
        found += unknown(where, entry, ("source", "weight", "tasks"))
        found += unknown(f"{where}.tasks", entry.get("tasks", {}), TASKS)
        if not isinstance(entry.get("source"), str):
            found.append(f"{where} has no source; give one of the sources that pretokenize read")
        numbers = {"weight": entry.get("weight", 1.0), **{f"tasks.{k}": v for k, v in entry.get("tasks", {}).items()}}
        for name, value in numbers.items():
            if not isinstance(value, int | float) or not 0 <= value < math.inf or (name == "weight" and not value):
                found.append(f"{where}.{name} is {value!r}; it must be a positive number")
    return found


def _connector_problems(config: Config) -> list[str]:
    """A sentence for every setting that does not fit the connector."""
    unified, data, encoder = config.model["unified"], config.data, config.model["encoder"]
    side = encoder.image_size // encoder.patch_size
    if unified.connector != "mlp":
        found = [
            f"config.{name} is {value}; only the connector 'mlp' can have it, and this one is {unified.connector!r}"
            for name, value, default in (
                ("data.max_slices", data.max_slices, 0),
                ("model.unified.patch_merge", unified.patch_merge, 1),
            )
            if value != default
        ]
        return found
    features = unified.features_of(encoder.num_patches)
    if side % unified.patch_merge:
        return [f"config.model.unified.patch_merge {unified.patch_merge} does not divide {side} patches per side"]
    found = []
    if unified.max_image_tokens != features:
        found.append(
            f"config.model.unified.max_image_tokens is {unified.max_image_tokens}; the connector 'mlp' gives "
            f"{features} features per image, and it must be that number"
        )
    has_code = config.model["image_tokenizer"].selection == "all" and unified.patch_merge == 1
    if data.image_targets and not has_code:
        found.append(
            f"config.data.image_targets is {data.image_targets}; it must be 0 where a feature of the connector 'mlp' "
            "has no code of its own (a selector, or patch_merge above 1)"
        )
    if data.max_slices == 1:
        found.append("config.data.max_slices is 1; the smallest grid has 2 slices, and 0 is none")
    return found


class LanguageModeling(Objective):
    """Next-token prediction. Batch: packed rows (`unimm_jax.data.packing.build_row`), each array with a leading [B].

    If `config.data.images_per_row` is 0, the model is the language model only (the text stage).
    """

    sections = {
        "encoder": ViTConfig,
        "image_tokenizer": ImageTokenizerConfig,
        "language": LanguageConfig,
        "unified": UnifiedConfig,
    }
    data_config = PackedDataConfig
    loss_config = LanguageModelingLossConfig
    accumulates = True

    def __init__(self, config: Config, data: pipeline.Input):
        m = config.model
        assert data.vocabulary is not None
        v = self.vocabulary = data.vocabulary
        self.used = v.first_position + v.num_position_ids

        def make(rngs: Keys) -> UnifiedModel:
            return UnifiedModel(
                m["encoder"] if config.data.images_per_row else None,
                m["image_tokenizer"],
                m["language"],
                m["unified"],
                text_rows=v.text_rows,
                visual_rows=v.visual_rows,
                rngs=rngs,
            )

        super().__init__(config, data, make)

    @classmethod
    def check(cls, config: Config) -> list[str]:
        """See `Objective.check`."""
        lm, found = config.model["language"], []
        if lm.heads % lm.kv_heads:
            found.append(f"config.model.language: {lm.kv_heads} kv_heads do not divide {lm.heads} heads")
        if lm.head_width % 2:
            found.append(f"config.model.language.head_width is {lm.head_width}; it must be even (rotary embeddings)")
        if not any(config.data.tasks.values()):
            found.append("config.data.tasks gives every task the weight 0; raise at least one")
        found += _mixture_problems(config.data.mixture)
        found += _connector_problems(config)
        if config.model["unified"].connector not in CONNECTORS:
            found.append(
                f"config.model.unified.connector is {config.model['unified'].connector!r}; it is one of "
                f"{', '.join(CONNECTORS)}"
            )
        if config.model["unified"].connector == "merger" and config.model["image_tokenizer"].architecture != "dynamic":
            found.append(
                "config.model.unified.connector is 'merger', which a bidirectional image tokenizer does not have; use "
                "'mlp'"
            )
        return found

    @classmethod
    def open_input(
        cls, config: Config, text_tokenizer: TextTokenizer | None = None, split: str = "train"
    ) -> pipeline.Input:
        """See `Objective.open_input`."""
        return pipeline.packed_input(config, split)

    @classmethod
    def abstract_input(cls, config: Config, text_rows: int = 32_000, codes: int = 16_384) -> pipeline.Input:
        """See `Objective.abstract_input`."""
        tokenizer = config.model["image_tokenizer"]
        grid = tokenizer.positions == "grid" and tokenizer.selection != "all"
        vocabulary = Vocabulary(text_rows, codes, config.model["encoder"].num_patches if grid and codes else 0)
        return pipeline.Input(None, text_tokenizer=text_tokenizer_lib.train(["a"], 300), vocabulary=vocabulary)

    @classmethod
    def batch_rows(cls, config: Config, multiple: int = 1) -> int:
        """See `Objective.batch_rows`. An example is taken to have one image and `TEXT_TOKENS` tokens of text."""
        tokens, tokenizer = config.train.batch_size, config.model["image_tokenizer"]
        if config.data.batch_unit == "examples":
            patches = pipeline.view_features(config) or config.model["encoder"].num_patches
            kept = patches if tokenizer.selection == "all" else round(patches * KEEP_RATE)
            image = 2 + kept * (2 if tokenizer.positions == "grid" else 1) if config.data.images_per_row else 0
            tokens *= image + TEXT_TOKENS
        rows = math.ceil(tokens / (FILL * config.data.seq_len))
        if config.data.images_per_row and config.data.batch_unit == "examples":
            tasks, readers = config.data.tasks, ("caption", "reconstruct", "question")
            shares = {name: tasks[name] for name in (*readers, "text_to_image", "text")}  # those of captioned images
            reading = sum(shares[name] for name in readers) / (sum(shares.values()) or 1.0)
            rows = max(rows, math.ceil(config.train.batch_size * reading / config.data.images_per_row))
        return -(-rows // multiple) * multiple

    @classmethod
    def batch_spec(cls, config: Config, rows: int = 0) -> BatchSpec:
        """See `Objective.batch_spec`."""
        num_patches = pipeline.view_features(config) or config.model["encoder"].num_patches
        row = build_row([], pipeline.packing_config(config), num_patches)
        rows = rows or cls.batch_rows(config)
        return {name: ((rows, *x.shape), x.dtype) for name, x in row.items()}

    def init(self, key: jax.Array) -> Tree:
        """Initialized parameters.

        Embeddings of patch position ids are initialized as sums of a row vector and a column vector, so that relative
        positions are directions from the first step on.
        """
        params = super().init(key)
        v = self.vocabulary
        if v.num_position_ids:
            side = round(v.num_position_ids**0.5)
            for name in {"embed_visual", "head_visual"} & set(params["language"]):  # a tied model has no separate head
                table = params["language"][name]
                lines = table[2 + v.codes : 2 + v.codes + 2 * side]
                grid = (lines[:side, None] + lines[None, side : 2 * side]).reshape(v.num_position_ids, -1)
                params["language"][name] = table.at[2 + v.codes : 2 + v.codes + v.num_position_ids].set(grid)
        return params

    def cross_entropy(self, params: Any, batch: Any) -> jax.Array:
        """Cross-entropy of the target of each position, float32 [B, T], without loss weights."""
        model = self.module(params)
        b = batch["tokens"].shape[0]
        images, keep = batch["images"], batch["keep"]
        if images.shape[1]:
            rows = model.features(
                model.encoder.normalize(images.reshape(-1, *images.shape[2:]), self.dtype),
                keep.reshape(-1, keep.shape[-1]),
            )
            x_BTD = model.inputs(batch["tokens"], batch["feature_index"], rows.reshape(b, -1, *rows.shape[1:]))
        else:
            x_BTD = model.language.embed(batch["tokens"], self.dtype)
        hidden_BTD = model.language(x_BTD, batch["positions"], batch["segments"])
        head_VD = model.language.head(self.dtype)  # gathered once instead of per chunk
        return chunked_cross_entropy(hidden_BTD, head_VD, batch["targets"], self.used, self.config.loss.chunk)

    def step_flops(self, batch: Batch) -> float:
        """See `Objective.step_flops`; sums the formulas of the parts.

        A trained part costs three forward passes, a frozen part after a trained one two, other frozen parts one.
        """
        m, trained = self.config.model, self.trained_parts()
        b, t = batch["tokens"].shape
        images, encoder, connector = b * batch["images"].shape[1], m["encoder"], m["unified"]
        merges = connector.connector == "merger"
        rows = connector.max_image_tokens if merges else connector.features_of(encoder.num_patches)
        inner = 0 if merges else 2 * encoder.num_patches * encoder.width * m["language"].width
        adapter = inner + 2 * rows * (encoder.width if merges else m["language"].width) * m["language"].width
        forward = {
            "encoder": images * encoder.flops,
            "merger": images * merges * m["image_tokenizer"].merger_flops(encoder.width, rows, encoder.num_patches),
            "adapter": images * adapter,
            "language": b * t * m["language"].flops(t, self.vocabulary.size),
        }
        total, has_gradient = 0.0, False
        for part, flops in forward.items():
            is_trained = any(name.startswith(part) for name in trained)
            total += flops * (3 if is_trained else 2 if has_gradient else 1)
            has_gradient = has_gradient or is_trained
        return total

    def loss(self, params: Tree, batch: Batch, key: jax.Array, step: jax.Array) -> tuple[jax.Array, Aux]:
        """Weighted mean of the cross-entropy; see `Objective.loss`.

        Metrics: the same mean over text targets and over visual targets, and the share of non-padding positions.
        """
        ce_BT = self.cross_entropy(params, batch)
        weights = batch["weights"]
        visual = batch["targets"] >= self.vocabulary.text_rows

        def mean(w: jax.Array) -> jax.Array:
            return (ce_BT * w).sum() / jnp.maximum(w.sum(), 1e-6)

        masks = {"text_ce": weights * ~visual, "code_ce": weights * visual}
        metrics = {name: mean(mask) for name, mask in masks.items()}
        metrics["fill"] = (batch["segments"] > 0).mean()
        metric_weights = {name: mask.sum() for name, mask in masks.items()} | {"fill": jnp.ones(())}
        return mean(weights), Aux(metrics, weight=weights.sum(), metric_weights=metric_weights)
