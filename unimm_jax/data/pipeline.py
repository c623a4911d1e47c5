"""Grain pipelines: from a config's data section to batches of numpy arrays. Order is a function of (seed, step).

Whoever iterates holds a Grain iterator; its state is the index of the next batch.
"""

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import grain
import numpy as np

from unimm_jax import text
from unimm_jax.data import transforms
from unimm_jax.data.packing import Layout, Records, RowSource, build_row
from unimm_jax.data.sources import Pictures, open_source
from unimm_jax.text import TextTokenizer
from unimm_jax.vocabulary import Vocabulary

Batch = dict[str, np.ndarray]
THREADS = max(2, min(16, os.cpu_count() or 2))  # each builds whole batches; more than cores slows reading down


@dataclasses.dataclass
class Input:
    """What a stage reads.

    Attributes:
      rows: random-access source of the rows of all batches, one after the other; or None where nothing is read.
      tokenizer: text tokenizer, or None where the stage has no text.
      vocabulary: token layout, or None likewise.
      records: the pretokenized records of a language stage, or None.
      header: what identifies the data (fingerprint and shapes), kept in checkpoints.
    """

    rows: Any
    tokenizer: TextTokenizer | None = None
    vocabulary: Vocabulary | None = None
    records: Records | None = None
    header: dict[str, Any] = dataclasses.field(default_factory=dict)

    def iterate(self, batch: int, share: np.ndarray | None = None) -> Any:
        """A fresh Grain iterator over batches, `THREADS` ahead of the consumer; its state is the number of the next.

        Args:
          batch: rows of a global batch. share: which of them this process reads; all if None.
        """
        share = np.arange(batch) if share is None else share
        dataset = grain.MapDataset.source(_Share(self.rows, batch, share))
        return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=THREADS + 2)))


def open_pictures(data: Any, split: str = "train") -> list[Pictures]:
    """Opens every source of `data.sources` (separated by ';')."""
    specs = [s.strip() for s in data.sources.split(";") if s.strip()]
    if not specs:
        raise ValueError("config.data.sources is empty; give 'scenes', a folder of pictures or a TFDS directory")
    return [Pictures(open_source(spec, split), data.image_size) for spec in specs]


def text_tokenizer(config: Any, pictures: list[Pictures]) -> TextTokenizer:
    """The configured text tokenizer, or one trained on the first 4,000 records' texts."""
    if config.text.path:
        return text.load(config.text.path)
    return text.train(sorted(set(all_texts(pictures))), config.text.size)


def all_texts(pictures: list[Pictures], limit: int = 4_000) -> list[str]:
    """Captions, questions and answers of up to `limit` records."""
    found: list[str] = []
    for source in pictures:
        for index in range(min(len(source), limit)):
            try:
                record = source.source[index]
            except ValueError:
                continue
            found += record["captions"]
            for question, answer, _ in record["questions"]:
                found += [question, answer]
    return found


class PictureRows:
    """Rows of single pictures as a random-access source: row `visit` is a function of (seed, visit).

    Sources are read in proportion to their size; every epoch is a new permutation.

    Args (constructor):
      read: a record → its arrays, given the item and what makes the generator for all that is drawn afresh at each
        visit (it takes as long as a small read, so only readers that draw call it).
    """

    def __init__(self, sources: list[Any], seed: int, rows: int, read: Any):
        self.sources, self.seed, self.rows, self.read = sources, seed, rows, read
        self.ends = np.cumsum([len(s) for s in sources])

    def __len__(self) -> int:
        return self.rows

    @functools.lru_cache(maxsize=4)  # noqa: B019 - one instance a process
    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(self.ends[-1])

    def __getitem__(self, visit: int) -> Batch:
        epoch, place = divmod(visit, int(self.ends[-1]))
        record = int(self._order(epoch)[place])
        source = int(np.searchsorted(self.ends, record, side="right"))
        start = int(self.ends[source - 1]) if source else 0
        generator = functools.partial(np.random.default_rng, [self.seed, visit, 1])
        return self.read(self.sources[source][record - start], generator)


class _Share:
    """What one process reads, batch by batch: the rows that its devices hold, in their order."""

    def __init__(self, rows: Any, batch: int, share: np.ndarray):
        self.rows, self.batch, self.share = rows, batch, share

    def __len__(self) -> int:
        return len(self.rows) // self.batch

    def __getitem__(self, index: int) -> Batch:
        rows = [self.rows[index * self.batch + int(row)] for row in self.share]
        return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def _rows_of(config: Any, sources: list[Any], read: Any) -> PictureRows:
    rows = (config.train.steps + 10_000) * config.train.batch_size  # room for what `prepare` reads
    return PictureRows(sources, config.seed, rows, read)


def picture_input(config: Any, tokenizer: TextTokenizer | None, pictures: list[Pictures]) -> Input:
    """Batches {images uint8 [B, H, W, 3]} and, with a text tokenizer, {tokens int32, valid boolean [B, T]}.

    Each visit draws one of the captions.
    """
    length = config.model.get("text_tower", {}).get("max_length", 0)

    def read(item: dict, generator: Callable[[], np.random.Generator]) -> Batch:
        if tokenizer is None:
            return {"images": item["image"]}
        ids = tokenizer.encode(item["captions"][generator().integers(len(item["captions"]))])[:length]
        tokens = np.zeros(length, np.int32)
        tokens[: len(ids)] = ids
        return {"images": item["image"], "tokens": tokens, "valid": np.arange(length) < len(ids)}

    header = {"sources": config.data.sources, "records": [len(p) for p in pictures]}
    return Input(_rows_of(config, pictures, read), tokenizer, None, None, header)


class _Decoded:
    """Records as arrays; pictures at `size` pixels a side, the size that was tokenized if 0."""

    def __init__(self, records: Records, size: int):
        self.records, self.size = records, size

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        item = self.records[index]
        image = transforms.to_pixels(item["picture"], self.size) if self.size else self.records.image(index)
        return {"images": image, "codes": item["codes"], "keep": item["keep"]}


def record_input(config: Any) -> Input:
    """Batches {images, codes int32 [B, P], keep boolean [B, P]} from records (the detokenizer's input)."""
    records = Records(config.data.records)

    rows = _rows_of(config, [_Decoded(records, config.data.get("pixel_size", 0))], lambda item, _: item)
    return Input(rows, records.tokenizer, None, records, records.header)


def packed_input(config: Any) -> Input:
    """Batches of packed rows (see `packing.build_row`), each array with a leading [B]."""
    records = Records(config.data.records)
    vocabulary = vocabulary_of(records)
    rows = (config.train.steps + 1) * config.train.batch_size
    source = RowSource(records, layout_of(config), vocabulary, config.seed, rows)
    return Input(source, records.tokenizer, vocabulary, records, records.header)


def batch_shapes(config: Any) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """name → (shape, dtype) of every array of a stage's batch, without data."""
    b, size = config.train.batch_size, config.data.image_size
    patches = (size // config.model.encoder.get("patch_size", 14)) ** 2
    if config.objective == "language_modeling":
        row = build_row([], layout_of(config), size, patches)
        return {name: ((b, *x.shape), x.dtype) for name, x in row.items()}
    shape = lambda *axes: (b, *axes)
    if config.objective in ("denoising", "pixel_decoding"):
        size = config.data.get("pixel_size", 0) or size
        codes, keep = (shape(patches), np.dtype(np.int32)), (shape(patches), np.dtype(bool))
        return {"images": (shape(size, size, 3), np.dtype(np.uint8)), "codes": codes, "keep": keep}
    found: dict[str, Any] = {"images": (shape(size, size, 3), np.dtype(np.uint8))}
    if config.objective == "contrastive":
        length = config.model.text_tower.max_length
        found |= {"tokens": (shape(length), np.dtype(np.int32)), "valid": (shape(length), np.dtype(bool))}
    return found


def vocabulary_of(records: Records) -> Vocabulary:
    """The token layout that a set of records implies."""
    grid = records.header["positions"] == "grid" and records.header["selection"] != "all"
    return Vocabulary(records.tokenizer.size, records.header["codes"], records.header["patches"] if grid else 0)


def layout_of(config: Any) -> Layout:
    """The packing layout of a language stage's config."""
    data = config.data
    return Layout(
        length=data.row_length,
        slots=data.row_pictures,
        budget=config.model.unified.budget,
        weights=tuple(sorted(data.tasks.items())),
        turns=data.turns,
        prompt_dropout=data.prompt_dropout,
        image_targets=data.image_targets,
        text_targets=data.text_targets,
        code_targets=data.code_targets,
        weights_end=tuple(sorted(data.tasks_end.items())),
        passes=data.passes,
    )


def open_input(config: Any, tokenizer: TextTokenizer | None = None) -> Input:
    """Opens the input that the config's objective needs.

    Args:
      tokenizer: a text tokenizer from an earlier stage, preferred to training one.

    Raises:
      ValueError: sources or records that are not there or not usable.
    """
    if config.objective in ("contrastive", "tokenization"):
        pictures = open_pictures(config.data)
        if config.objective == "tokenization":
            return picture_input(config, None, pictures)
        return picture_input(config, tokenizer or text_tokenizer(config, pictures), pictures)
    return record_input(config) if config.objective in ("denoising", "pixel_decoding") else packed_input(config)
