"""Examples of the language stages, and their packing into rows.

A plan assigns examples to rows from the lengths stored in the records. It is a function of (records, packing config,
seed), so a row number is the whole state of the input, for any number of processes.
"""

import collections
import dataclasses
import functools
import threading

import numpy as np

from unimm_jax.data.documents import IGNORED, Document, Layout, Tokens, input_images, length, render
from unimm_jax.data.outlines import Outline
from unimm_jax.data.records import Records
from unimm_jax.data.tasks import REGISTRY, TaskSettings, get
from unimm_jax.errors import DataError


@dataclasses.dataclass(frozen=True)
class SourceShare:
    """A source of the records in a mixture.

    Attributes:
      number: its number in `Records.source`. weight: its share of the examples, relative to the other weights.
      tasks: task → share of its examples; () uses those of the packing config.
    """

    number: int
    weight: float
    tasks: tuple[tuple[str, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class PackingConfig:
    """How examples are drawn and packed into rows.

    Attributes:
      seq_len: tokens per row T.
      images_per_row: input images per row R, for which the model computes features.
      max_image_tokens: maximum number of features per image S.
      weights: task → share of the examples in the first pass over the records.
      weights_end, epochs: shares in the last of `epochs` passes, interpolated linearly between; () keeps `weights`.
      tasks: settings of the tasks.
      sources: the mixture; () reads every record once per pass.
    """

    seq_len: int
    images_per_row: int
    max_image_tokens: int
    weights: tuple[tuple[str, float], ...]
    weights_end: tuple[tuple[str, float], ...] = ()
    epochs: int = 1
    tasks: TaskSettings = TaskSettings()
    sources: tuple[SourceShare, ...] = ()

    def shares(self, epoch: int) -> dict[str, float]:
        """task → share of the examples in pass `epoch` over the records (from 0); tasks with share 0 are left out."""
        start, end = dict(self.weights), dict(self.weights_end or self.weights)
        done = min(epoch / max(self.epochs - 1, 1), 1.0)
        mixed = {t: (1 - done) * start.get(t, 0.0) + done * end.get(t, 0.0) for t in REGISTRY}
        return {task: share for task, share in mixed.items() if share > 0}


@dataclasses.dataclass(frozen=True)
class Example:
    """One example of the plan.

    Attributes:
      record: index of the record.
      task: a name of `tasks.REGISTRY`.
      variant: seed of the example's random choices (caption, prompt dropout, questions).
    """

    record: int
    task: str
    variant: int


@dataclasses.dataclass
class BuiltExample:
    """An example in tokens, with its input images uint8 [H, W, 3] and their keep masks boolean [P]."""

    tokens: Tokens
    images: list[np.ndarray]
    keep: list[np.ndarray]


def document_of(records: Records, example: Example, packing: PackingConfig) -> Document:
    """The document of an example."""
    return get(example.task).build(records.outline(example.record), example.variant, packing.tasks)


def example_size(records: Records, example: Example, packing: PackingConfig, layout: Layout) -> tuple[int, int]:
    """Number of tokens and of input images of an example, from the index alone."""
    document = document_of(records, example, packing)
    tokens = length(document, records.texts[example.record], records.kept[example.record], layout)
    return tokens, len(input_images(document))


def build_example(records: Records, example: Example, packing: PackingConfig, layout: Layout) -> BuiltExample:
    """Reads the record of an example and renders its document."""
    item = records[example.record]
    tokens = render(document_of(records, example, packing), item.texts, item.keep, item.codes, layout)
    images = [records.image(example.record, i) for i in tokens.inputs]
    return BuiltExample(tokens, images, [item.keep[i] for i in tokens.inputs])


class Plan:
    """Assigns examples to an endless sequence of rows. Row r is a function of (records, packing, seed, r).

    Each epoch is a permutation of the records with one task per record, packed first-fit into rows of `packing.seq_len`
    tokens and `packing.images_per_row` images. Records to which no task applies, and examples that do not fit an empty
    row, are dropped.

    Attributes:
      dropped: reason → number of records that the last packed epoch dropped.
    """

    OPEN = 64  # maximum number of rows kept open while packing

    def __init__(self, records: Records, packing: PackingConfig, layout: Layout, seed: int):
        self.records, self.packing, self.layout, self.seed = records, packing, layout, seed
        self.dropped: dict[str, int] = {}
        self._starts = [0]
        self._lock = threading.Lock()
        self._epochs: dict[int, list[list[Example]]] = {}

    def __getitem__(self, row: int) -> list[Example]:
        with self._lock:
            epoch = 0
            while True:
                if len(self._starts) <= epoch + 1:
                    self._starts.append(self._starts[epoch] + len(self._rows(epoch)))
                if row < self._starts[epoch + 1]:
                    return self._rows(epoch)[row - self._starts[epoch]]
                epoch += 1

    def _rows(self, epoch: int) -> list[list[Example]]:
        if epoch not in self._epochs:
            if len(self._epochs) >= 2:
                self._epochs.pop(min(self._epochs))
            self._epochs[epoch] = self.pack(epoch)
        return self._epochs[epoch]

    def notes(self) -> list[str]:
        """What a user should know about the first epoch: the shares of the tasks, and records that are dropped."""
        self[0]  # packs the first epoch
        tasks = collections.Counter(example.task for row in self._rows(0) for example in row)
        total = sum(tasks.values())
        shares = ", ".join(f"{name} {count / total:.1%}" for name, count in tasks.most_common())
        found = [f"{total} examples in the first epoch: {shares}"]
        return found + [f"{n} of {len(self.records)} examples are dropped: {why}" for why, n in self.dropped.items()]

    def examples(self, epoch: int) -> list[Example]:
        """The examples of an epoch in order, before packing.

        The task of a record is drawn from those that apply to it, in proportion to their shares.
        """
        rng = np.random.default_rng([self.seed, epoch])
        count = len(self.records)
        shares = [self.packing.shares(epoch)]
        draws = rng.random(count)
        variants = rng.integers(2**31, size=count)
        order = visits = rng.permutation(count)
        sources = np.zeros(count, int)
        if self.packing.sources:
            shares = [dict(source.tasks) or shares[0] for source in self.packing.sources]
            visits, sources = self._visits(epoch)

        @functools.cache
        def choices(outline: Outline, source: int) -> tuple[list[str], np.ndarray]:
            found = {name: share for name, share in shares[source].items() if share and get(name).applies(outline)}
            ends = np.cumsum(np.array(list(found.values())) / sum(found.values()))
            return list(found), ends / ends[-1:]

        found = []
        for place in order.tolist():
            record = int(visits[place]) if self.packing.sources else place
            names, ends = choices(self.records.outline(record), int(sources[place]))
            if names:
                task = names[int(ends.searchsorted(draws[place], side="right"))]
                found.append(Example(record, task, int(variants[place])))
        return found

    def _visits(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(record, index of its source in the mixture) of every example of an epoch; as many as there are records.

        Every source is read in an endless sequence of permutations of its records, at its own speed, so that no record
        is read a second time before all others of the source were.
        """
        weights = np.array([source.weight for source in self.packing.sources])
        ends = np.round(np.cumsum(weights / weights.sum()) * len(self.records)).astype(int)
        records, numbers = [], []
        for i, (source, count) in enumerate(zip(self.packing.sources, np.diff(ends, prepend=0), strict=True)):
            mine = np.flatnonzero(self.records.source == source.number)
            passes, places = np.divmod(np.arange(epoch * count, (epoch + 1) * count), len(mine))
            for number in np.unique(passes):
                order = np.random.default_rng([self.seed, number, source.number, 7]).permutation(mine)
                records.append(order[places[passes == number]])
            numbers.append(np.full(count, i))
        return np.concatenate(records), np.concatenate(numbers)

    def pack(self, epoch: int) -> list[list[Example]]:
        """Packs an epoch first-fit: the examples of each row, rows in the order in which they were opened.

        Raises:
          DataError: no example fits a row.
        """
        packing = self.packing
        rows: list[list[Example]] = []
        room: collections.OrderedDict[int, list[int]] = collections.OrderedDict()
        examples = self.examples(epoch)
        long, crowded = f"longer than {packing.seq_len} tokens", f"more than {packing.images_per_row} input images"
        dropped = {"no task of config.data.tasks applies": len(self.records) - len(examples), long: 0, crowded: 0}
        for example in examples:
            tokens, images = example_size(self.records, example, packing, self.layout)
            if tokens > packing.seq_len or images > packing.images_per_row:
                dropped[long if tokens > packing.seq_len else crowded] += 1
                continue
            fits = (r for r, left in room.items() if left[0] >= tokens and left[1] >= images)
            row = next(fits, len(rows))
            if row == len(rows):
                rows.append([])
                room[row] = [packing.seq_len, packing.images_per_row]
                if len(room) > self.OPEN:
                    room.popitem(last=False)
            rows[row].append(example)
            left = room[row]
            left[0] -= tokens
            left[1] -= images
            if left[0] < 4:
                room.pop(row, None)
        self.dropped = {reason: count for reason, count in dropped.items() if count}
        if not rows:
            reasons = "; ".join(f"{count} × {reason}" for reason, count in self.dropped.items())
            raise DataError(
                f"no example fits a row of {packing.seq_len} tokens and {packing.images_per_row} images ({reasons}); "
                "raise config.data.seq_len or images_per_row, or choose other tasks in config.data.tasks"
            )
        return rows


def build_row(
    examples: list[BuiltExample], packing: PackingConfig, image_size: int, num_patches: int
) -> dict[str, np.ndarray]:
    """Concatenates examples into one row and pads it.

    Args:
      image_size: side of the images in pixels.
      num_patches: patches per image P.

    Returns:
      tokens, targets, segments, positions, feature_index int32 [T]; weights float32 [T]; images uint8 [R, H, W, 3];
      keep boolean [R, P]. Targets and weights are shifted: position t holds those of position t + 1. Segment 0 is
      padding. `feature_index` indexes the flattened [R · S] features of the row, or is IGNORED.
    """
    length = packing.seq_len
    row: dict[str, np.ndarray] = {
        "tokens": np.zeros(length, np.int32),
        "targets": np.zeros(length, np.int32),
        "weights": np.zeros(length, np.float32),
        "segments": np.zeros(length, np.int32),
        "positions": np.zeros(length, np.int32),
        "feature_index": np.full(length, IGNORED, np.int32),
        "images": np.zeros((packing.images_per_row, image_size, image_size, 3), np.uint8),
        "keep": np.zeros((packing.images_per_row, num_patches), bool),
    }
    row["keep"][:, 0] = True  # unused image slots keep one patch, so that no mean over kept patches divides by zero
    at = slot = 0
    for segment, example in enumerate(examples, 1):
        tokens = example.tokens
        size = len(tokens.ids)
        span = slice(at, at + size)
        row["tokens"][span] = tokens.ids
        row["targets"][at : at + size - 1] = tokens.targets[1:]
        row["weights"][at : at + size - 1] = tokens.weights[1:]
        row["segments"][span] = segment
        row["positions"][span] = np.arange(size)
        first = slot * packing.max_image_tokens
        row["feature_index"][span] = np.where(tokens.feature >= 0, tokens.feature + first, IGNORED)
        for image, keep in zip(example.images, example.keep, strict=True):
            row["images"][slot], row["keep"][slot] = image, keep
            slot += 1
        at += size
    return row


class RowSource:
    """The first `rows` rows of a plan as a random-access source for Grain; see `build_row` for their arrays."""

    def __init__(self, records: Records, packing: PackingConfig, layout: Layout, seed: int, rows: int):
        self.plan, self.rows = Plan(records, packing, layout, seed), rows
        self.build = functools.partial(build_example, records, packing=packing, layout=layout)

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        records = self.plan.records
        examples = [self.build(e) for e in self.plan[index]]
        return build_row(examples, self.plan.packing, records.header["image_size"], records.header["num_patches"])
