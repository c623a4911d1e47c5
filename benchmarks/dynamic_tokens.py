"""Image–text pairs a second of the language step: LaVIT's dynamic tokens against all 256 of a picture, both packed.

python -m benchmarks.dynamic_tokens

Equal models (float32 on a processor, bfloat16 on a GPU): a language model of 110 million parameters, an encoder of an
eighth of it and a trained merger, all in the step, AdamW. Half the pairs are [image, text], half [text, image], with
captions of 20 tokens, in rows of 2,048. Kept tokens of a picture are drawn around LaVIT's mean of 90 (deviation 25).
"""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
from ml_collections import ConfigDict

from benchmarks import timing
from configs import stage2
from unimm_jax import sharding, train
from unimm_jax.data import packing, pipeline
from unimm_jax.vocabulary import Vocabulary

PATCHES, CAPTION, RECORDS, LENGTH, MOST = 256, 20, 4096, 2048, 192
VOCABULARY = Vocabulary(8_000, 8_192)


class Words:
    """A text tokenizer whose every caption has `CAPTION` ids."""

    bos, eos = 1, 2

    def encode(self, text: str) -> list[int]:
        """Ids of any caption."""
        return list(range(3, 3 + CAPTION)) if text else []


class Pairs:
    """What the packing needs of records, without files: lengths, noise for pictures, random codes."""

    def __init__(self, kept: np.ndarray):
        self.kept, self.tokenizer = kept, Words()
        self.captions = [np.array([CAPTION])] * len(kept)
        self.questions = type("None", (), {"ends": np.zeros(len(kept) + 1, int)})()

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> dict:
        rng = np.random.default_rng(index)
        keep = np.zeros(PATCHES, bool)
        keep[rng.choice(PATCHES, self.kept[index], replace=False)] = True
        return {"keep": keep, "codes": rng.integers(0, VOCABULARY.codes, PATCHES), "captions": ["words"]}

    def image(self, index: int) -> np.ndarray:
        """Noise."""
        return np.random.default_rng(index).integers(0, 256, (224, 224, 3)).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The model (settings of encoder, tokenizer and language model) and the rows of a step."""

    encoder: dict
    tokenizer: dict
    language: dict
    dtype: str
    rows: int


def sizes(gpu: bool) -> Sizes:
    """110 million parameters and an eighth of them in the encoder."""
    return Sizes(
        dict(width=384, depth=8, heads=6, mlp_width=1536, scan=gpu),
        dict(heads=6, mlp_width=1536, merger_depth=2, scan=gpu),
        dict(width=768, layers=12, heads=12, kv_heads=12, head_width=64, mlp_width=2048, scan=gpu),
        "bfloat16" if gpu else "float32",
        8 if gpu else 1,
    )


def config_of(budget: int, slots: int, size: Sizes) -> ConfigDict:
    """Stage 2 with the sizes of this benchmark."""
    c = stage2.get_config("one_gpu")
    c.dtype = size.dtype
    c.model.encoder = dict(size.encoder)
    c.model.tokenizer.update(codes=VOCABULARY.codes, **size.tokenizer)
    c.model.language = dict(size.language)
    c.model.unified.budget = budget
    c.data.update(image_size=224, row_length=LENGTH, row_pictures=slots)
    c.data.tasks = ConfigDict(dict(caption=0.5, text_to_image=0.5))
    c.data.tasks_end = ConfigDict()
    c.data.prompt_dropout = 0.0
    c.optimizer.name = "adamw"
    c.loss.chunk = 1024
    c.train.batch_size = size.rows
    return c


@dataclasses.dataclass(frozen=True)
class Case:
    """`step` trains once on `batch`: `pairs` a step, `fill` of its positions not padding, `flops` operations by the
    models' formulae."""

    step: Callable[[], None]
    config: ConfigDict
    batch: dict
    pairs: float
    fill: float
    flops: float


def case(kept: np.ndarray, budget: int, slots: int, size: Sizes) -> Case:
    """Stage 2 on records that keep `kept` tokens each, `slots` pictures a row of at most `budget` feature rows each."""
    config, pairs = config_of(budget, slots, size), Pairs(kept)
    plan = packing.Plan(pairs, pipeline.layout_of(config), VOCABULARY, seed=0)
    packed = plan.pack(0)[:-1]  # the last row holds what was left
    lengths = [sum(packing.example_length(pairs, e, plan.layout, VOCABULARY, 1) for e in row) for row in packed]
    fill, examples = np.sum(lengths) / (LENGTH * len(packed)), np.mean([len(row) for row in packed])
    build = lambda e: packing.build_example(pairs, e, plan.layout, VOCABULARY)
    rows = [packing.build_row([build(e) for e in row], plan.layout, 224, PATCHES) for row in packed[: size.rows]]
    mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
    stage = train.build(config, pipeline.Input(None, vocabulary=VOCABULARY), mesh)
    places = jax.tree.map(lambda x: x.sharding, stage.state)
    params = jax.jit(stage.init, out_shardings=places["params"])(jax.random.key(0))
    opt = jax.jit(stage.init_optimizer, out_shardings=places["opt"])(params)
    zero = jax.device_put(jax.numpy.asarray(0, jax.numpy.int32), places["step"])
    state = {"params": params, "opt": opt, "step": zero, "bad_step": zero - 1}
    arrays = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    batch = jax.device_put(arrays)
    count = lambda part: sum(x.size for x in jax.tree.leaves(params[part])) / 1e6
    print({part: f"{count(part):.1f} million" for part in params}, flush=True)
    held = [state]

    def step():
        with jax.set_mesh(mesh):
            held[0], metrics = stage.step(held[0], batch)
        assert np.isfinite(float(metrics["loss"]))

    return Case(step, config, arrays, examples * size.rows, fill, stage.objective.step_flops(arrays))


def drawn_lengths() -> np.ndarray:
    """Kept tokens of every record."""
    return np.random.default_rng(0).normal(90, 25, RECORDS).round().astype(int).clip(16, MOST)


def main(size: Sizes, rounds: int = 5) -> None:
    """Prints fill, pairs a second and their ratio."""
    kept = drawn_lengths()
    dynamic = case(kept, MOST, 12, size)
    fixed = case(np.full(RECORDS, PATCHES), PATCHES, 5, size)
    seconds = timing.compare("language step", dynamic.step, {"256 tokens a picture": fixed.step}, rounds)
    ours, theirs = dynamic.pairs / seconds["ours"], fixed.pairs / seconds["256 tokens a picture"]
    print(
        f"dynamic: mean {kept.mean():.1f} tokens a picture, {dynamic.fill:.1%} of positions filled, {ours:.3f} pairs/s"
    )
    print(f"fixed: 256 tokens a picture, {fixed.fill:.1%} of positions filled, {theirs:.3f} pairs/s")
    print(f"dynamic is {ours / theirs:.2f} times as fast")


if __name__ == "__main__":
    main(sizes(timing.prepare()))
