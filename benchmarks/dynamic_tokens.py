"""Image-text pairs per second of the language step: LaVIT's dynamic tokens against all 256 per image, both packed.

python -m benchmarks.dynamic_tokens

Equal models (float32 on a CPU, bfloat16 on a GPU): a language model of 110 million parameters, an encoder of an eighth
of that and a trained merger, all in the step, with AdamW. Half of the pairs are [image, text], half [text, image], with
captions of 20 tokens, in rows of 2,048. The number of kept tokens per image has LaVIT's mean of 90 (deviation 25).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks import timing
from unimm_jax import resolve, sharding, train
from unimm_jax.config import Config
from unimm_jax.data import outlines, packing, pipeline
from unimm_jax.data.documents import Layout
from unimm_jax.data.outlines import Outline
from unimm_jax.data.plan import Plan
from unimm_jax.data.records import Ragged, StoredRecord
from unimm_jax.vocabulary import Vocabulary

PATCHES, CAPTION, RECORDS, LENGTH, MAX_TOKENS = 256, 20, 4096, 2048, 192
EXAMPLES = 1024  # that are packed together
VOCABULARY = Vocabulary(8_000, 8_192)


class FixedTextTokenizer:
    """A text tokenizer with `CAPTION` ids for every caption."""

    bos, eos = 1, 2

    def encode(self, text: str) -> list[int]:
        """Ids of any caption."""
        return list(range(3, 3 + CAPTION)) if text else []


class Pairs:
    """What packing needs of records, without files: lengths, images of noise, random codes."""

    def __init__(self, kept: np.ndarray):
        self.kept, self.texts = kept[:, None], np.full((len(kept), 1), CAPTION)
        self.source, one = np.zeros(len(kept), int), np.arange(len(kept) + 1)
        self.outlines = Ragged(np.full(len(kept), outlines.CAPTION, np.uint8), one)

    def __len__(self) -> int:
        return len(self.kept)

    def outline(self, index: int) -> Outline:
        """One image with one caption."""
        return Outline(images=1, captions=(0,))

    def __getitem__(self, index: int) -> StoredRecord:
        rng = np.random.default_rng(index)
        keep = np.zeros(PATCHES, bool)
        keep[rng.choice(PATCHES, self.kept[index, 0], replace=False)] = True
        codes = rng.integers(0, VOCABULARY.codes, PATCHES)
        return StoredRecord(str(index), [], [keep], [codes], ["words"], [])

    def image(self, index: int, number: int = 0) -> np.ndarray:
        """Noise."""
        return np.random.default_rng(index).integers(0, 256, (224, 224, 3)).astype(np.uint8)

    def views(self, index: int, number: int, side: int, max_slices: int, rule: str) -> list[np.ndarray]:
        """The whole image alone."""
        return [self.image(index, number)]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The model (settings of encoder, image tokenizer and language model) and the rows per step."""

    encoder: dict[str, Any]
    image_tokenizer: dict[str, Any]
    language: dict[str, Any]
    dtype: str
    rows: int


def sizes(gpu: bool) -> Sizes:
    """A language model of 110 million parameters and an encoder of an eighth of that."""
    return Sizes(
        dict(width=384, depth=8, heads=6, mlp_width=1536, scan=gpu),
        dict(heads=6, mlp_width=1536, merger_depth=2, scan=gpu),
        dict(width=768, layers=12, heads=12, kv_heads=12, head_width=64, mlp_width=2048, scan=gpu),
        "bfloat16" if gpu else "float32",
        8 if gpu else 1,
    )


def config_of(max_image_tokens: int, images_per_row: int, size: Sizes) -> Config:
    """Stage 2 with the sizes of this benchmark."""
    given = resolve.load("stage2:one_gpu").to_dict()
    given |= dict(dtype=size.dtype, evals={}, init_from=())
    given["train"]["batch_size"] = EXAMPLES
    given["optimizer"]["name"] = "adamw"
    given["loss"]["chunk"] = 1024
    given["data"] |= dict(
        image_size=224,
        seq_len=LENGTH,
        images_per_row=images_per_row,
        prompt_dropout=0.0,
        tasks=dict(caption=0.5, text_to_image=0.5),
        tasks_end={},
    )
    given["model"] |= dict(
        encoder=size.encoder,
        image_tokenizer=given["model"]["image_tokenizer"] | dict(codes=VOCABULARY.codes) | size.image_tokenizer,
        language=size.language,
    )
    given["model"]["unified"]["max_image_tokens"] = max_image_tokens
    return resolve.parse(given)


@dataclasses.dataclass(frozen=True)
class Case:
    """One train step.

    Attributes:
      step: trains once on `batch`.
      pairs: pairs per step. fill: share of its positions that are not padding.
      flops: operations per step by the formulas of the models.
    """

    step: Callable[[], None]
    config: Config
    batch: dict[str, np.ndarray]
    pairs: float
    fill: float
    flops: float


def case(kept: np.ndarray, max_image_tokens: int, images_per_row: int, size: Sizes) -> Case:
    """Stage 2 on records that keep `kept` tokens each."""
    config, pairs = config_of(max_image_tokens, images_per_row, size), Pairs(kept)
    settings: Any = pipeline.packing_config(config)
    records: Any = pairs
    text_tokenizer: Any = FixedTextTokenizer()
    layout = Layout(VOCABULARY, text_tokenizer, max_image_tokens)
    packed = Plan(records, settings, layout, seed=0).rows(0)
    lengths = [sum(packing.example_size(records, e, settings, layout)[0] for e in row) for row in packed]
    fill, examples = np.sum(lengths) / (LENGTH * len(packed)), np.mean([len(row) for row in packed])
    rows = []
    for row in packed[: size.rows]:
        built = [packing.build_example(records, example, settings, layout) for example in row]
        rows.append(packing.build_row(built, settings, PATCHES))
    arrays = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    step, flops = _train_step(config, arrays)
    return Case(step, config, arrays, float(examples) * size.rows, float(fill), flops)


def _train_step(config: Config, arrays: dict[str, np.ndarray]) -> tuple[Callable[[], None], float]:
    """(function that trains once, operations per step)."""
    mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
    stage = train.build(config, pipeline.Input(None, vocabulary=VOCABULARY), mesh)
    shardings = jax.tree.map(lambda x: x.sharding, stage.state)
    params = jax.jit(stage.init, out_shardings=shardings["params"])(jax.random.key(0))
    opt = jax.jit(stage.init_optimizer, out_shardings=shardings["opt"])(params)
    zero = jax.device_put(jax.numpy.asarray(0, jax.numpy.int32), shardings["step"])
    held = [{"params": params, "opt": opt, "step": zero, "bad_step": zero - 1}]
    counts = {part: sum(x.size for x in jax.tree.leaves(tree)) / 1e6 for part, tree in params.items()}
    print({part: f"{count:.1f} million" for part, count in counts.items()}, flush=True)
    batch = jax.device_put(arrays)

    def step() -> None:
        with jax.set_mesh(mesh):
            held[0], metrics = stage.step(held[0], batch)
        assert np.isfinite(float(metrics["loss"]))

    return step, stage.objective.step_flops(arrays)


def drawn_lengths() -> np.ndarray:
    """Kept tokens of every record."""
    return np.random.default_rng(0).normal(90, 25, RECORDS).round().astype(int).clip(16, MAX_TOKENS)


def main(size: Sizes, rounds: int = 5) -> None:
    """Prints fill, pairs per second and their ratio."""
    kept = drawn_lengths()
    dynamic = case(kept, MAX_TOKENS, 12, size)
    fixed = case(np.full(RECORDS, PATCHES), PATCHES, 5, size)
    seconds = timing.compare("language step", dynamic.step, {"256 tokens per image": fixed.step}, rounds)
    ours, theirs = dynamic.pairs / seconds["ours"], fixed.pairs / seconds["256 tokens per image"]
    print(f"dynamic: {kept.mean():.1f} tokens per image, {dynamic.fill:.1%} of positions filled, {ours:.3f} pairs/s")
    print(f"fixed: 256 tokens per image, {fixed.fill:.1%} of positions filled, {theirs:.3f} pairs/s")
    print(f"dynamic is {ours / theirs:.2f} times as fast")


if __name__ == "__main__":
    main(sizes(timing.prepare()))
