"""Grain pipelines from a config's data section to batches of NumPy arrays.

The order of the data is a function of (seed, step). The state of a Grain iterator is the index of its next batch.
"""

import concurrent.futures
import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np

from unimm_jax import text_tokenizer as text_tokenizer_lib
from unimm_jax.config import Config, ImageDataConfig, TextTokenizerConfig
from unimm_jax.data.documents import Layout
from unimm_jax.data.outlines import flatten
from unimm_jax.data.packing import PackingConfig, SourceShare, build_example, build_row
from unimm_jax.data.plan import Plan
from unimm_jax.data.records import Records
from unimm_jax.data.sources import DecodedDataset, open_source, source_number, split_sources
from unimm_jax.data.sources.base import Decoded
from unimm_jax.data.tasks import TaskSettings
from unimm_jax.errors import ConfigError, DataError, EmptySplitError
from unimm_jax.text_tokenizer import TextTokenizer
from unimm_jax.vocabulary import Vocabulary

Batch = dict[str, np.ndarray]
ORDER = 2  # version of the order of the examples; 1, without this key in the header, counted batches in packed rows
THREADS = max(2, min(16, os.cpu_count() or 2))  # each builds whole batches; more threads than cores are slower
REMOTE_THREADS = 32  # that read the rows of all batches from sources on object stores, where they mostly wait


Share = Callable[[int], np.ndarray]  # number of rows of a global batch → indices of the rows of this process


@dataclasses.dataclass
class Input:
    """The input of a stage.

    Attributes:
      rows: `ImageRows` or `PackedRows`: the rows of every batch. None for an abstract input without data.
      text_tokenizer: the text tokenizer, or None if the stage has no text.
      vocabulary: token ids of the language stages, or None.
      records: the records of a language or decoder stage, or None.
      header: identity of the data (fingerprints and shapes); saved in checkpoints.
    """

    rows: Any
    text_tokenizer: TextTokenizer | None = None
    vocabulary: Vocabulary | None = None
    records: Records | None = None
    header: dict[str, Any] = dataclasses.field(default_factory=dict)

    def notes(self, multiple: int = 1) -> list[str]:
        """Sentences about the data that a user should read, for example how many examples are replaced.

        Args:
          multiple: see `size`.
        """
        return self.rows.plan.notes(self.rows.size(0, multiple)) if isinstance(self.rows, PackedRows) else []

    def counts(self, index: int) -> dict[str, float]:
        """What a global batch holds: examples, images and, if it is packed, tokens that are not padding."""
        if isinstance(self.rows, PackedRows):
            return self.rows.plan.step(index).counts
        return {"examples": self.rows.batch_size, "images": self.rows.batch_size}

    def replaced_share(self, index: int) -> float:
        """Share of the examples around a batch that did not fit and were replaced by others."""
        return self.rows.plan.step(index).replaced_share if isinstance(self.rows, PackedRows) else 0.0

    def size(self, index: int = 0, multiple: int = 1) -> int:
        """Number of rows of a global batch, padding rows included.

        Args:
          index: of the batch. multiple: the devices that share the rows, times micro-batches; packed rows are padded to
            a multiple of it.
        """
        return self.rows.size(index, multiple)

    def batch(self, index: int, share: Share = np.arange, multiple: int = 1) -> Batch:
        """One batch by its index, without prefetching.

        Args:
          share: which rows this process reads; all by default. multiple: see `size`.
        """
        return _Batches(self.rows, share, multiple)[index]

    def iterate(self, share: Share = np.arange, multiple: int = 1) -> Any:
        """A new Grain iterator over batches, which prefetches `THREADS` + 2 batches; arguments as in `batch`."""
        dataset = grain.MapDataset.source(_Batches(self.rows, share, multiple))
        return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=THREADS + 2)))


class _Batches:
    """The batches of one process: index → its rows of that global batch, stacked."""

    def __init__(self, rows: Any, share: Share, multiple: int):
        self.rows, self.share, self.multiple = rows, share, multiple

    def __len__(self) -> int:
        return self.rows.steps

    def __getitem__(self, index: int) -> Batch:
        first, *others = self.share(self.rows.size(index, self.multiple)).tolist()
        read = functools.partial(self.rows.row, index)
        rows = [read(first)]  # alone, since it may compute the order of an epoch
        rows += (_readers().map if self.rows.is_remote else map)(read, others)
        return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


@functools.cache
def _readers() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(REMOTE_THREADS)


class ImageRows:
    """Rows of single images; row i of batch b is a function of (seed, b · batch_size + i).

    Every epoch is a new permutation of the records of all sources, so sources are read in proportion to their size.

    Args (constructor):
      sources: random-access sources of records.
      seed: seed of the order and of the random generators.
      batch_size: images per batch. steps: number of batches.
      read: (record, factory of its random generator) → arrays. Seeding a generator takes as long as a small read, so
        only readers that sample call the factory.
    """

    def __init__(self, sources: list[Any], seed: int, batch_size: int, steps: int, read: Callable[..., Batch]):
        self.sources, self.seed, self.batch_size, self.steps, self.read = sources, seed, batch_size, steps, read
        self.ends = np.cumsum([len(s) for s in sources])
        self.is_remote = any(getattr(source, "is_remote", False) for source in sources)

    def size(self, index: int, multiple: int) -> int:
        """See `Input.size`. Images are not padded, so the batch size must be a multiple of `multiple`."""
        return self.batch_size

    def row(self, index: int, row: int) -> Batch:
        """A row of a batch."""
        return self[index * self.batch_size + row]

    @functools.lru_cache(maxsize=4)  # noqa: B019 - one instance per process
    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(self.ends[-1])

    def place(self, visit: int) -> tuple[int, int]:
        """(number of the source, index in it) of a visit."""
        epoch, position = divmod(visit, int(self.ends[-1]))
        record = int(self._order(epoch)[position])
        source = int(np.searchsorted(self.ends, record, side="right"))
        return source, record - (int(self.ends[source - 1]) if source else 0)

    def __getitem__(self, visit: int) -> Batch:
        source, record = self.place(visit)
        generator = functools.partial(np.random.default_rng, [self.seed, visit, 1])
        return self.read(self.sources[source][record], generator)


def _image_rows(config: Config, sources: list[Any], read: Callable[..., Batch]) -> ImageRows:
    steps = config.train.steps + 10_000  # the margin is for `Objective.prepare`
    return ImageRows(sources, config.seed, config.train.batch_size, steps, read)


class PackedRows:
    """Rows of packed examples (see `packing.build_row`); the rows of a batch are a function of (seed, its index)."""

    def __init__(self, plan: Plan, steps: int):
        self.plan, self.steps, self.batch_size = plan, steps, plan.batch
        self.is_remote = False  # records are read from local copies of their blocks

    def size(self, index: int, multiple: int) -> int:
        """See `Input.size`."""
        needed = max(self.plan.rows_per_step, len(self.plan.rows(index)))
        return -(-needed // multiple) * multiple

    def row(self, index: int, row: int) -> Batch:
        """A row of a batch; rows after the last one are padding."""
        plan = self.plan
        rows, records = plan.rows(index), plan.records
        examples = rows[row] if row < len(rows) else []
        built = [build_example(records, example, plan.packing, plan.layout) for example in examples]
        return build_row(built, plan.packing, plan.layout.view_features or records.header["num_patches"])


# ---- Images from sources ---------------------------------------------------------------------------------------------


def open_images(
    data: ImageDataConfig, split: str = "train", needs: tuple[str, ...] = ("images",)
) -> list[DecodedDataset]:
    """Opens one split of every source in `data.sources` (separated by ";").

    Args:
      needs: what a usable record has; see `DecodedDataset`.

    Raises:
      ConfigError: `data.sources` is empty.
      DataError: a source is missing or unusable.
    """
    descriptions = split_sources(data.sources)
    if not descriptions:
        raise ConfigError("config.data.sources is empty; give 'scenes', a directory of images or a TFDS directory")
    found = []
    for description in descriptions:
        try:
            source = open_source(description, split, data.held_out)
        except EmptySplitError as error:
            if split == "train":
                raise
            logging.warning("%s", error)  # the other sources still have held-out records
            continue
        found.append(DecodedDataset(source, data.image_size, needs, data.fit, data.max_crop))
    if not found:
        raise EmptySplitError(f"no source of {data.sources!r} has records in its {split} split")
    return found


def make_text_tokenizer(config: TextTokenizerConfig, datasets: list[DecodedDataset]) -> TextTokenizer:
    """Loads the configured text tokenizer, or trains one on the texts of the first 4,000 records of each data set.

    Raises:
      DataError: `config.path` is missing or unreadable.
    """
    if config.path:
        return text_tokenizer_lib.load(config.path)
    return text_tokenizer_lib.train(sorted(set(all_texts(datasets))), config.vocab_size)


def all_texts(datasets: list[DecodedDataset], limit: int = 4_000) -> list[str]:
    """The texts of the first `limit` records of each data set; unreadable records are skipped."""

    def texts(dataset: DecodedDataset, index: int) -> Sequence[str]:
        try:
            return flatten(dataset.source[index])[0]
        except DataError:
            return ()

    found: list[str] = []
    for dataset in datasets:
        read = _readers().map if dataset.is_remote else map
        for some in read(functools.partial(texts, dataset), range(min(len(dataset), limit))):
            found += some
    return found


def image_input(
    config: Config, datasets: list[DecodedDataset], text_tokenizer: TextTokenizer | None = None, max_length: int = 0
) -> Input:
    """Input with batches {images uint8 [B, H, W, 3]} and, with a text tokenizer, {tokens int32, valid boolean [B, T]}.

    Each read samples one of the record's captions and prompts, or, without a text tokenizer, one of its images.

    Args:
      max_length: tokens per caption T; longer captions are truncated.
    """

    def read(item: Decoded, generator: Callable[[], np.random.Generator]) -> Batch:
        if text_tokenizer is None:
            count = len(item.pixels)
            return {"images": item.pixels[0 if count == 1 else generator().integers(count)]}
        captions = (*item.record.captions, *item.record.prompts)
        ids = text_tokenizer.encode(captions[generator().integers(len(captions))])[:max_length]
        tokens = np.zeros(max_length, np.int32)
        tokens[: len(ids)] = ids
        return {"images": item.pixels[0], "tokens": tokens, "valid": np.arange(max_length) < len(ids)}

    header = {
        "sources": config.data.sources,
        "records": [len(d) for d in datasets],
        "fingerprints": [d.source.fingerprint() for d in datasets],
    }
    return Input(_image_rows(config, datasets, read), text_tokenizer, None, None, header)


# ---- Records ---------------------------------------------------------------------------------------------------------


class _RecordImages:
    """The images of records as arrays, with `size` pixels per side; 0 is the size that was tokenized."""

    def __init__(self, records: Records, size: int):
        self.records, self.size = records, size

    def __len__(self) -> int:
        return self.records.num_images

    def __getitem__(self, number: int) -> dict[str, Any]:
        record, i = self.records.image_place(number)
        item = self.records[record]
        image = self.records.resized(record, i, self.size) if self.size else self.records.image(record, i)
        return {"images": image, "codes": item.codes[i], "keep": item.keep[i]}


def record_input(config: Config, split: str = "train") -> Input:
    """Input of the decoder stages: batches {images uint8 [B, H, W, 3], codes int32 [B, P], keep boolean [B, P]}.

    Raises:
      DataError: the records are missing or damaged.
    """
    records = Records.open(config.data.records, split)
    rows = _image_rows(config, [_RecordImages(records, config.data.pixel_size)], lambda item, _: item)
    return Input(rows, records.text_tokenizer, None, records, records.header)


def packed_input(config: Config, split: str = "train") -> Input:
    """Input of the language stages: batches of packed rows (see `packing.build_row`), each array with a leading [B].

    Raises:
      DataError: the records are missing or damaged, or no example can be made of them.
    """
    records = Records.open(config.data.records, split)
    if config.data.max_slices and not records.has_sizes:
        raise DataError(
            f"the records in {config.data.records} do not say how large their images are, which config.data.max_slices "
            "needs; remove that directory and write it again with python -m unimm_jax.pretokenize"
        )
    features, patches = view_features(config), records.header["num_patches"]
    if config.data.image_targets and features and features != patches:
        raise ConfigError(
            f"config.data.image_targets is {config.data.image_targets}; it must be 0, because images are read as "
            f"{features} features and have {patches} codes"
        )
    packing = dataclasses.replace(packing_config(config), sources=_mixture(config, records, split))
    layout = layout_of(records.header, records.text_tokenizer, config)
    plan = Plan(records, packing, layout, config.seed, config.train.steps, skip_empty=split == "test")
    rows = PackedRows(plan, config.train.steps + 10_000)
    return Input(rows, records.text_tokenizer, layout.vocabulary, records, records.header | {"order": ORDER})


def _mixture(config: Config, records: Records, split: str) -> tuple[SourceShare, ...]:
    """The mixture of a language stage, with the sources by their number in the records.

    Sources without a held-out record are left out of split "test".

    Raises:
      ConfigError: a source that the records do not have. DataError: a source without records.
    """
    listed = split_sources(records.header.get("sources", ""))
    found = []
    for entry in config.data.mixture:
        number, tasks = source_number(entry["source"], listed), entry.get("tasks", {})
        if number is None:
            raise ConfigError(
                f"config.data.mixture names the source {entry['source']!r}; the records in {records.path} come from "
                f"{', '.join(listed)}. Give one of them, or a format that only one of them has"
            )
        if not (records.source == number).any():
            if split == "test":
                continue
            raise DataError(f"the records in {records.path} have no usable record of the source {entry['source']!r}")
        found.append(SourceShare(number, float(entry.get("weight", 1.0)), tuple(tasks.items())))
    if config.data.mixture and not found:
        raise EmptySplitError(f"no source of config.data.mixture has records in {records.path}")
    return tuple(found)


def layout_of(header: dict[str, Any], text_tokenizer: TextTokenizer, config: Config) -> Layout:
    """How documents become tokens, for a language stage and records with the given header."""
    vocabulary = vocabulary_of(header, text_tokenizer)
    return Layout(vocabulary, text_tokenizer, config.model["unified"].max_image_tokens, view_features(config))


def view_features(config: Config) -> int:
    """Number of features of every image that a language stage reads; 0 if it reads those of kept patches."""
    unified = config.model["unified"]
    return unified.features_of(config.model["encoder"].num_patches) if unified.connector == "mlp" else 0


def vocabulary_of(header: dict[str, Any], text_tokenizer: TextTokenizer) -> Vocabulary:
    """The vocabulary for records with the given header."""
    grid = header["positions"] == "grid" and header["selection"] != "all"
    return Vocabulary(text_tokenizer.num_rows, header["codes"], header["num_patches"] if grid else 0)


def packing_config(config: Config) -> PackingConfig:
    """The packing settings in the config of a language stage."""
    data = config.data
    return PackingConfig(
        batch=config.train.batch_size,
        batch_unit=data.batch_unit,
        seq_len=data.seq_len,
        images_per_row=data.images_per_row,
        max_image_tokens=config.model["unified"].max_image_tokens,
        image_size=data.image_size,
        max_slices=data.max_slices,
        slice_grids=data.slice_grids,
        global_view_share=data.global_view_share,
        weights=tuple(sorted(data.tasks.items())),
        weights_end=tuple(sorted(data.tasks_end.items())) if any(data.tasks_end.values()) else (),
        epochs=data.tasks_epochs,
        tasks=task_settings(config),
    )


def task_settings(config: Config) -> TaskSettings:
    """The settings of the tasks in the config of a language stage."""
    data = config.data
    return TaskSettings(**{field.name: getattr(data, field.name) for field in dataclasses.fields(TaskSettings)})
