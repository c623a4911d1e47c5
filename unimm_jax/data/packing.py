"""Records, examples and the packing plan.

`pretokenize` stores what the frozen tokenizer said of every picture (keep mask, codes) beside its bytes and texts. From
the stored lengths a deterministic plan says which examples share a row: a function of (seed, epoch) alone, so a row
number is all the state that input has, whatever the number of processes.
"""

import collections
import dataclasses
import functools
import io
import json
import os
import pathlib
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import msgpack
import numpy as np

from unimm_jax.data import transforms
from unimm_jax.data.sources import CACHE_BYTES
from unimm_jax.text import TextTokenizer
from unimm_jax.vocabulary import Vocabulary

TASKS = ("text", "caption", "reconstruct", "text_to_image", "question")
IGNORED = -1  # source row of a position that is not a picture feature


class RecordWriter:
    """Writes the records of one split to a directory, block by block, so that an interrupted run goes on and several
    processes share the work: `blocks/NNNNNN.array_record` with `.npz` (lengths) beside it, then `header.json` last.

    A block counts when its `.npz` is there, a directory when its header is.

    Args (constructor):
      identity: what the records come from (fingerprint, sources, ...); another's unfinished records are refused.

    Raises (constructor):
      ValueError: the directory holds unfinished records of another tokenizer or of other data.
    """

    def __init__(self, path: str, tokenizer: TextTokenizer, identity: dict[str, Any]):
        self.path, self.tokenizer = pathlib.Path(path), tokenizer
        (self.path / "blocks").mkdir(parents=True, exist_ok=True)
        self.identity = json.loads(json.dumps(identity | {"text_tokenizer": tokenizer.payload}))
        plan = self.path / "plan.json"
        if plan.exists() and json.loads(plan.read_text()) != self.identity:
            raise ValueError(
                f"{path} holds unfinished records of another tokenizer or of other data; remove it or give another "
                "--output"
            )
        _write_whole(plan, json.dumps(self.identity).encode())

    def _file(self, block: int, ending: str) -> pathlib.Path:
        return self.path / "blocks" / f"{block:06d}.{ending}"

    def has(self, block: int) -> bool:
        """Whether a block is written."""
        return self._file(block, "npz").exists()

    def write(self, block: int, items: Iterable[tuple[dict, np.ndarray, np.ndarray]]) -> None:
        """Writes a block of (record, keep boolean [P], codes int [P]; stored for kept patches only)."""
        from array_record.python.array_record_module import ArrayRecordWriter

        kept: list[int] = []
        captions: list[list[int]] = []
        questions: list[list[int]] = []
        count = lambda words: len(self.tokenizer.encode(words))
        partial = self._file(block, f"array_record.{os.getpid()}")
        writer = ArrayRecordWriter(str(partial), "group_size:1")
        for item, keep, codes in items:
            picture = item["picture"]
            data = {
                "key": item["key"],
                "picture": picture if isinstance(picture, bytes) else transforms.encode_png(picture),
                "keep": np.packbits(keep).tobytes(),
                "codes": codes[keep].astype("<u4" if codes.max(initial=0) > 65535 else "<u2").tobytes(),
                "captions": item["captions"],
                "questions": item["questions"],
            }
            writer.write(msgpack.packb(data))
            kept.append(int(keep.sum()))
            captions.append([count(c) for c in item["captions"]])
            questions.append([count(q) + count(a) + 1 for q, a, _ in item["questions"]])
        writer.close()
        partial.rename(self._file(block, "array_record"))
        flat = lambda lists: np.array([n for row in lists for n in row], np.uint16)
        lengths = lambda lists: np.array([len(row) for row in lists], np.int32)
        buffer = io.BytesIO()
        np.savez(
            buffer,
            kept=np.array(kept, np.int32),
            captions=flat(captions),
            caption_counts=lengths(captions),
            questions=flat(questions),
            question_counts=lengths(questions),
        )
        _write_whole(self._file(block, "npz"), buffer.getvalue())

    def close(self, blocks: int, header: dict[str, Any]) -> dict[str, Any]:
        """Finishes the directory, all its blocks being there; `header` holds at least `patches`, `codes`, `image_size`.

        Returns:
          the header as written, with the number of records and the tokens a picture.
        """
        parts = [np.load(self._file(block, "npz")) for block in range(blocks)]
        joined: dict[str, Any] = {key: np.concatenate([part[key] for part in parts]) for key in parts[0].files}
        buffer = io.BytesIO()
        np.savez(buffer, **joined)
        _write_whole(self.path / "index.npz", buffer.getvalue())
        kept = joined["kept"]
        header = self.identity | header | dict(records=len(kept), blocks=blocks, tokens=round(float(kept.mean()), 4))
        _write_whole(self.path / "header.json", json.dumps(header).encode())
        return header


def _write_whole(file: pathlib.Path, data: bytes) -> None:
    """A file that is there whole or not at all."""
    partial = file.with_name(f"{file.name}.{os.getpid()}")
    partial.write_bytes(data)
    partial.rename(file)


class Records:
    """Random access to a directory that `pretokenize` wrote.

    Raises (constructor):
      ValueError: no finished records there.
    """

    def __init__(self, path: str):
        self.path = pathlib.Path(path)
        if not (self.path / "header.json").exists():
            raise ValueError(f"{path} holds no finished records; write them with python -m unimm_jax.pretokenize")
        self.header: dict[str, Any] = json.loads((self.path / "header.json").read_text())
        self.tokenizer = TextTokenizer(self.header["text_tokenizer"])
        index = np.load(self.path / "index.npz")
        if missing := {"kept", "captions", "caption_counts", "questions", "question_counts"} - set(index.files):
            raise ValueError(
                f"{path}/index.npz lacks {', '.join(sorted(missing))}: another version of unimm_jax wrote these "
                "records; write them anew with python -m unimm_jax.pretokenize"
            )
        self.kept: np.ndarray = index["kept"]
        self.captions = _Ragged(index["captions"], index["caption_counts"])
        self.questions = _Ragged(index["questions"], index["question_counts"])
        self._reader: Any = None
        self._items: dict[int, dict] = {}
        self._images: dict[int, np.ndarray] = {}
        self._small = len(self) * self.header["image_size"] ** 2 * 3 <= CACHE_BYTES  # then all stays in memory
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> dict:
        """{key, picture (bytes), keep boolean [P], codes int32 [P], captions, questions}; do not change it."""
        if index in self._items:
            return self._items[index]
        with self._lock:
            if self._reader is None:
                from array_record.python.array_record_data_source import ArrayRecordDataSource

                files = [f"{block:06d}.array_record" for block in range(self.header["blocks"])]
                self._reader = ArrayRecordDataSource([str(self.path / "blocks" / name) for name in files])
            item = msgpack.unpackb(self._reader[index])
        patches = self.header["patches"]
        item["keep"] = np.unpackbits(np.frombuffer(item["keep"], np.uint8), count=patches).astype(bool)
        width = "<u2" if len(item["codes"]) == 2 * item["keep"].sum() else "<u4"
        codes = np.zeros(patches, np.int32)
        codes[item["keep"]] = np.frombuffer(item["codes"], width)
        item["codes"] = codes
        if self._small:
            self._items[index] = item
        return item

    def image(self, index: int) -> np.ndarray:
        """The decoded picture of a record, uint8 [S, S, 3]; do not change it."""
        if index in self._images:
            return self._images[index]
        image = transforms.to_pixels(self[index]["picture"], self.header["image_size"])
        if self._small:
            self._images[index] = image
        return image


class _Ragged:
    """Lists of lengths, stored flat."""

    def __init__(self, values: np.ndarray, counts: np.ndarray):
        self.values, self.ends = values.astype(np.int32), np.concatenate([[0], np.cumsum(counts)])

    def __getitem__(self, index: int) -> np.ndarray:
        return self.values[self.ends[index] : self.ends[index + 1]]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How examples become rows.

    Attributes:
      length: tokens a row T. slots: pictures a row R whose features the model computes. budget: features a picture S.
      weights: task → share of the examples, in the first pass over the records.
      weights_end, passes: where the shares move to, linearly, over that many passes; () keeps them.
      turns: questions a `question` example holds at most, of different kinds.
      prompt_dropout: share of text-to-image examples without their text (guidance; 0.1 in ILLUME+'s code).
      image_targets: loss weight of the code targets at picture positions (LaVIT's [image, text]; 0 for ILLUME).
      text_targets: loss weight of the prompt's own words in text-to-image.
      code_targets: loss weight of the codes that are to be written.
    """

    length: int
    slots: int
    budget: int
    weights: tuple[tuple[str, float], ...]
    turns: int = 3
    prompt_dropout: float = 0.1
    image_targets: float = 1.0
    text_targets: float = 1.0
    code_targets: float = 1.0
    weights_end: tuple[tuple[str, float], ...] = ()
    passes: int = 1

    def shares(self, epoch: int) -> dict[str, float]:
        """task → share of the examples of a pass over the records."""
        start, end = dict(self.weights), dict(self.weights_end or self.weights)
        done = min(epoch / max(self.passes - 1, 1), 1.0)
        mixed = {t: (1 - done) * start.get(t, 0.0) + done * end.get(t, 0.0) for t in TASKS}
        return {task: share for task, share in mixed.items() if share > 0}


@dataclasses.dataclass(frozen=True)
class Example:
    """One example of the plan: which record, which task, and the seed of its choices (caption, questions)."""

    record: int
    task: str
    variant: int


def example_length(records: Records, example: Example, layout: Layout, vocabulary: Vocabulary, bos: int) -> int:
    """Tokens an example takes, from stored lengths alone.

    Args:
      bos: 1 where the text tokenizer has a beginning-of-text token.
    """
    kept = int(min(records.kept[example.record], layout.budget))
    picture = 2 + kept * (2 if vocabulary.patches else 1)
    captions = records.captions[example.record]
    if example.task == "text":
        return bos + int(captions[example.variant % len(captions)]) + 1
    if example.task == "caption":
        return picture + int(captions[0]) + 1
    if example.task == "reconstruct":
        return 2 * picture
    if example.task == "text_to_image":
        dropped = _dropped(example, layout)
        return (0 if dropped else bos + int(captions[example.variant % len(captions)])) + picture
    turns = chosen_turns(len(records.questions[example.record]), example, layout)
    return picture + int(sum(records.questions[example.record][t] for t in turns))


def _dropped(example: Example, layout: Layout) -> bool:
    return (example.variant >> 8) % 1000 < layout.prompt_dropout * 1000


def chosen_turns(count: int, example: Example, layout: Layout) -> list[int]:
    """Which of a record's `count` questions an example asks, in order; of the first two (yes, no) one at most."""
    rng = np.random.default_rng(example.variant)
    order = [int(i) for i in rng.permutation(count)]
    pair = next((i for i in order if i < 2), None)
    return [i for i in order if i >= 2 or i == pair][: layout.turns]


@dataclasses.dataclass
class Tokens:
    """An example in tokens; arrays of its length. `feature` is the row of the picture's features or IGNORED."""

    ids: np.ndarray
    targets: np.ndarray  # what this position is as a target (codes at feature positions)
    weights: np.ndarray  # loss weight of predicting it
    feature: np.ndarray
    image: np.ndarray | None
    keep: np.ndarray | None


def build_example(records: Records, example: Example, layout: Layout, vocabulary: Vocabulary) -> Tokens:
    """Writes an example in tokens.

    Features and codes stand in raster order, in the grid variant each after the id of its place.
    text: `<s> words </s>`; caption: `[IMG] features [/IMG] words </s>`; reconstruct: `[IMG] features [/IMG] [IMG] codes
    [/IMG]`; text_to_image: `<s> words [IMG] codes [/IMG]`, or from `[IMG]` on where the prompt is dropped; question:
    `[IMG] features [/IMG]` and then `question answer </s>` for each turn, answers alone in the loss.
    """
    item, tokenizer = records[example.record], records.tokenizer
    ids: list[int] = []
    targets: list[int] = []
    weights: list[float] = []
    feature: list[int] = []

    def put(tokens: Sequence[int], weight: float) -> None:
        ids.extend(tokens)
        targets.extend(tokens)
        weights.extend([weight] * len(tokens))
        feature.extend([IGNORED] * len(tokens))

    patches = np.flatnonzero(item["keep"])[: layout.budget]
    codes = item["codes"][patches]

    def read() -> None:
        put([vocabulary.start], 0.0)
        slots, rows = vocabulary.place_features(patches)
        ids.extend(slots.tolist())
        targets.extend(vocabulary.write_image(patches, codes).tolist())
        weights.extend([layout.image_targets] * len(slots))
        feature.extend(rows.tolist())
        put([vocabulary.end], layout.image_targets)

    def write(first_weight: float) -> None:
        put([vocabulary.start], first_weight)
        put(vocabulary.write_image(patches, codes).tolist(), layout.code_targets)
        put([vocabulary.end], layout.code_targets)

    captions = item["captions"]
    bos = [] if tokenizer.bos is None else [tokenizer.bos]
    if example.task == "text":
        put([*bos, *tokenizer.encode(captions[example.variant % len(captions)]), tokenizer.eos], 1.0)
    elif example.task == "caption":
        read()
        put([*tokenizer.encode(captions[0]), tokenizer.eos], 1.0)
    elif example.task == "reconstruct":
        read()
        write(0.0)
    elif example.task == "text_to_image":
        if _dropped(example, layout):
            write(0.0)
        else:
            words = tokenizer.encode(captions[example.variant % len(captions)])
            put([*bos, *words], layout.text_targets)
            write(layout.text_targets)
    else:
        read()
        for turn in chosen_turns(len(item["questions"]), example, layout):
            question, answer, _ = item["questions"][turn]
            put(tokenizer.encode(question), 0.0)
            put([*tokenizer.encode(answer), tokenizer.eos], 1.0)
    reads = example.task in ("caption", "reconstruct", "question")
    return Tokens(
        np.array(ids, np.int32),
        np.array(targets, np.int32),
        np.array(weights, np.float32),
        np.array(feature, np.int32),
        records.image(example.record) if reads else None,
        item["keep"] if reads else None,
    )


def reads_picture(task: str) -> bool:
    """Whether a task's examples need a slot for picture features."""
    return task in ("caption", "reconstruct", "question")


class Plan:
    """Which examples share which row. Row r of the endless plan is a function of (records, layout, seed, r).

    Each epoch is a permutation of the records with a task each, packed first-fit into rows of `layout.length` tokens
    and `layout.slots` pictures. Examples longer than a row are left out and counted in `cut`.
    """

    OPEN = 64  # rows kept open while packing

    def __init__(self, records: Records, layout: Layout, vocabulary: Vocabulary, seed: int):
        self.records, self.layout, self.vocabulary, self.seed = records, layout, vocabulary, seed
        self.bos = int(records.tokenizer.bos is not None)
        self.cut = 0
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

    def examples(self, epoch: int) -> list[Example]:
        """The epoch's examples in order, before packing."""
        rng = np.random.default_rng([self.seed, epoch])
        count = len(self.records)
        names = list(mixture := self.layout.shares(epoch))
        shares = np.array([mixture[name] for name in names])
        tasks = rng.choice(len(names), count, p=shares / shares.sum())
        variants = rng.integers(2**31, size=count)
        order = rng.permutation(count)
        asked = np.diff(self.records.questions.ends) > 0
        found = []
        for record in order:
            task = names[tasks[record]]
            if task == "question" and not asked[record]:
                task = "caption"
            found.append(Example(int(record), task, int(variants[record])))
        return found

    def pack(self, epoch: int) -> list[list[Example]]:
        """First-fit over the epoch's examples: rows in the order in which they were opened."""
        layout = self.layout
        rows: list[list[Example]] = []
        room: collections.OrderedDict[int, list[int]] = collections.OrderedDict()
        cut = 0
        for example in self.examples(epoch):
            length = example_length(self.records, example, layout, self.vocabulary, self.bos)
            slot = int(reads_picture(example.task))
            if length > layout.length or slot > layout.slots:
                cut += 1
                continue
            fits = (r for r, left in room.items() if left[0] >= length and left[1] >= slot)
            row = next(fits, len(rows))
            if row == len(rows):
                rows.append([])
                room[row] = [layout.length, layout.slots]
                if len(room) > self.OPEN:
                    room.popitem(last=False)
            rows[row].append(example)
            left = room[row]
            left[0] -= length
            left[1] -= slot
            if left[0] < 4:
                room.pop(row, None)
        self.cut = cut
        if not rows:
            raise ValueError(f"no example fits a row of {layout.length} tokens and {layout.slots} pictures")
        return rows


def build_row(examples: list[Tokens], layout: Layout, image_size: int, patches: int) -> dict[str, np.ndarray]:
    """Lays examples into one row.

    Returns:
      tokens, targets, segments, positions, feature_index int32 [T]; weights float32 [T]; images uint8 [R, H, W, 3];
      keep boolean [R, P]. Targets are shifted: position t holds what follows it. Segment 0 is padding.
    """
    length = layout.length
    row: dict[str, np.ndarray] = {
        "tokens": np.zeros(length, np.int32),
        "targets": np.zeros(length, np.int32),
        "weights": np.zeros(length, np.float32),
        "segments": np.zeros(length, np.int32),
        "positions": np.zeros(length, np.int32),
        "feature_index": np.full(length, IGNORED, np.int32),
        "images": np.zeros((layout.slots, image_size, image_size, 3), np.uint8),
        "keep": np.zeros((layout.slots, patches), bool),
    }
    row["keep"][:, 0] = True  # an empty slot keeps one patch: nothing downstream divides by zero
    at = slot = 0
    for segment, example in enumerate(examples, 1):
        size = len(example.ids)
        span = slice(at, at + size)
        row["tokens"][span] = example.ids
        row["targets"][at : at + size - 1] = example.targets[1:]
        row["weights"][at : at + size - 1] = example.weights[1:]
        row["segments"][span] = segment
        row["positions"][span] = np.arange(size)
        if example.image is not None:
            shifted = np.where(example.feature >= 0, example.feature + slot * layout.budget, IGNORED)
            row["feature_index"][span] = shifted
            row["images"][slot], row["keep"][slot] = example.image, example.keep
            slot += 1
        at += size
    return row


class RowSource:
    """The plan as a random-access source of finished rows, for Grain."""

    def __init__(self, records: Records, layout: Layout, vocabulary: Vocabulary, seed: int, rows: int):
        self.plan, self.rows = Plan(records, layout, vocabulary, seed), rows
        self.build = functools.partial(build_example, records, layout=layout, vocabulary=vocabulary)

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        records = self.plan.records
        examples = [self.build(e) for e in self.plan[index]]
        return build_row(examples, self.plan.layout, records.header["image_size"], records.header["patches"])
