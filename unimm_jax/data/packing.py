"""Examples of the language stages, and their packing into rows.

A plan assigns examples to rows from the lengths stored in the records. It is a function of (records, packing config,
seed), so a row number is the whole state of the input, for any number of processes.
"""

import collections
import dataclasses
import functools
import threading
from collections.abc import Sequence

import numpy as np

from unimm_jax.config import TASKS
from unimm_jax.data.records import Records
from unimm_jax.errors import DataError
from unimm_jax.vocabulary import Vocabulary

IGNORED = -1  # feature index of a position without an image feature


@dataclasses.dataclass(frozen=True)
class PackingConfig:
    """How examples are built and packed into rows.

    Attributes:
      seq_len: tokens per row T.
      images_per_row: input images per row R, for which the model computes features.
      max_image_tokens: maximum number of features per image S.
      weights: task → share of the examples in the first pass over the records.
      max_questions: maximum number of questions per `question` example.
      prompt_dropout: share of text-to-image examples without their prompt, for guidance (0.1 in ILLUME+'s code).
      image_targets: loss weight of the code targets at positions of input images (LaVIT's [image, text]; 0 in ILLUME).
      text_targets: loss weight of the prompt in text-to-image examples.
      code_targets: loss weight of the codes of generated images.
      weights_end, epochs: shares in the last of `epochs` passes, interpolated linearly between; () keeps `weights`.
    """

    seq_len: int
    images_per_row: int
    max_image_tokens: int
    weights: tuple[tuple[str, float], ...]
    max_questions: int = 3
    prompt_dropout: float = 0.1
    image_targets: float = 1.0
    text_targets: float = 1.0
    code_targets: float = 1.0
    weights_end: tuple[tuple[str, float], ...] = ()
    epochs: int = 1

    def shares(self, epoch: int) -> dict[str, float]:
        """task → share of the examples in pass `epoch` over the records (from 0); tasks with share 0 are left out."""
        start, end = dict(self.weights), dict(self.weights_end or self.weights)
        done = min(epoch / max(self.epochs - 1, 1), 1.0)
        mixed = {t: (1 - done) * start.get(t, 0.0) + done * end.get(t, 0.0) for t in TASKS}
        return {task: share for task, share in mixed.items() if share > 0}


@dataclasses.dataclass(frozen=True)
class Example:
    """One example of the plan.

    Attributes:
      record: index of the record.
      task: a name of `config.TASKS`.
      variant: seed of the example's random choices (caption, prompt dropout, questions).
    """

    record: int
    task: str
    variant: int


def example_length(records: Records, example: Example, packing: PackingConfig, vocabulary: Vocabulary, bos: int) -> int:
    """Number of tokens of an example, from the stored lengths; equals the length of `build_example`'s arrays.

    Args:
      bos: 1 if the text tokenizer has a beginning-of-text token, else 0.
    """
    kept = int(min(records.kept[example.record], packing.max_image_tokens))
    image = 2 + kept * (2 if vocabulary.num_position_ids else 1)
    captions = records.captions[example.record]
    if example.task == "text":
        return bos + int(captions[example.variant % len(captions)]) + 1
    if example.task == "caption":
        return image + int(captions[0]) + 1
    if example.task == "reconstruct":
        return 2 * image
    if example.task == "text_to_image":
        dropped = _dropped(example, packing)
        return (0 if dropped else bos + int(captions[example.variant % len(captions)])) + image
    chosen = chosen_questions(len(records.questions[example.record]), example, packing)
    return image + int(sum(records.questions[example.record][i] for i in chosen))


def _dropped(example: Example, packing: PackingConfig) -> bool:
    """Whether a text-to-image example loses its prompt."""
    return (example.variant >> 8) % 1000 < packing.prompt_dropout * 1000


def chosen_questions(count: int, example: Example, packing: PackingConfig) -> list[int]:
    """Indices of the questions that an example asks, in order.

    At most one of the first two is chosen (in the scenes, existence questions with the answers yes and no).

    Args:
      count: number of questions of the record.
    """
    rng = np.random.default_rng(example.variant)
    order = [int(i) for i in rng.permutation(count)]
    pair = next((i for i in order if i < 2), None)
    return [i for i in order if i >= 2 or i == pair][: packing.max_questions]


@dataclasses.dataclass
class TokenizedExample:
    """An example in tokens. `ids`, `targets`, `weights` and `feature` are [T], T being the example's length.

    Attributes:
      ids: token ids, int32.
      targets: target of predicting each position, int32: its id, or its code where the input is an image feature.
      weights: loss weight of predicting each position, float32.
      feature: index into the image's features, or IGNORED, int32.
      image: the input image, uint8 [H, W, 3], or None.
      keep: its keep mask, boolean [P], or None.
    """

    ids: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    feature: np.ndarray
    image: np.ndarray | None
    keep: np.ndarray | None


def build_example(
    records: Records, example: Example, packing: PackingConfig, vocabulary: Vocabulary
) -> TokenizedExample:
    """Builds the tokens of an example.

    Features and codes are in raster order; with position ids, each follows the id of its patch position. Per task:

      text: <s> text </s>
      caption: [IMG] features [/IMG] text </s>
      reconstruct: [IMG] features [/IMG] [IMG] codes [/IMG]
      text_to_image: <s> text [IMG] codes [/IMG]; without `<s> text` if the prompt is dropped
      question: [IMG] features [/IMG], then `question answer </s>` per question; questions have loss weight 0
    """
    item, tokenizer = records[example.record], records.text_tokenizer
    ids: list[int] = []
    targets: list[int] = []
    weights: list[float] = []
    feature: list[int] = []

    def put(tokens: Sequence[int], weight: float) -> None:
        ids.extend(tokens)
        targets.extend(tokens)
        weights.extend([weight] * len(tokens))
        feature.extend([IGNORED] * len(tokens))

    patches = np.flatnonzero(item["keep"])[: packing.max_image_tokens]
    codes = item["codes"][patches]

    def put_input_image() -> None:
        put([vocabulary.start], 0.0)
        slots, rows = vocabulary.place_features(patches)
        ids.extend(slots.tolist())
        targets.extend(vocabulary.write_image(patches, codes).tolist())
        weights.extend([packing.image_targets] * len(slots))
        feature.extend(rows.tolist())
        put([vocabulary.end], packing.image_targets)

    def put_output_image(first_weight: float) -> None:
        put([vocabulary.start], first_weight)
        put(vocabulary.write_image(patches, codes).tolist(), packing.code_targets)
        put([vocabulary.end], packing.code_targets)

    captions = item["captions"]
    bos = [] if tokenizer.bos is None else [tokenizer.bos]
    if example.task == "text":
        put([*bos, *tokenizer.encode(captions[example.variant % len(captions)]), tokenizer.eos], 1.0)
    elif example.task == "caption":
        put_input_image()
        put([*tokenizer.encode(captions[0]), tokenizer.eos], 1.0)
    elif example.task == "reconstruct":
        put_input_image()
        put_output_image(0.0)
    elif example.task == "text_to_image":
        if _dropped(example, packing):
            put_output_image(0.0)
        else:
            put([*bos, *tokenizer.encode(captions[example.variant % len(captions)])], packing.text_targets)
            put_output_image(packing.text_targets)
    else:
        put_input_image()
        for index in chosen_questions(len(item["questions"]), example, packing):
            question, answer, _ = item["questions"][index]
            put(tokenizer.encode(question), 0.0)
            put([*tokenizer.encode(answer), tokenizer.eos], 1.0)
    reads = example.task in ("caption", "reconstruct", "question")
    return TokenizedExample(
        np.array(ids, np.int32),
        np.array(targets, np.int32),
        np.array(weights, np.float32),
        np.array(feature, np.int32),
        records.image(example.record) if reads else None,
        item["keep"] if reads else None,
    )


def reads_image(task: str) -> bool:
    """Whether the examples of a task have an input image."""
    return task in ("caption", "reconstruct", "question")


class Plan:
    """Assigns examples to an endless sequence of rows. Row r is a function of (records, packing, seed, r).

    Each epoch is a permutation of the records with one task per record, packed first-fit into rows of `packing.seq_len`
    tokens and `packing.images_per_row` images. Examples that do not fit an empty row are dropped.

    Attributes:
      num_dropped: number of examples that the last packed epoch dropped.
    """

    OPEN = 64  # maximum number of rows kept open while packing

    def __init__(self, records: Records, packing: PackingConfig, vocabulary: Vocabulary, seed: int):
        self.records, self.packing, self.vocabulary, self.seed = records, packing, vocabulary, seed
        self.bos = int(records.text_tokenizer.bos is not None)
        self.num_dropped = 0
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
        """The examples of an epoch in order, before packing. Records without questions get `caption` for `question`."""
        rng = np.random.default_rng([self.seed, epoch])
        count = len(self.records)
        names = list(mixture := self.packing.shares(epoch))
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
        """Packs an epoch first-fit: the examples of each row, rows in the order in which they were opened.

        Raises:
          DataError: no example fits a row.
        """
        packing = self.packing
        rows: list[list[Example]] = []
        room: collections.OrderedDict[int, list[int]] = collections.OrderedDict()
        num_dropped = 0
        for example in self.examples(epoch):
            length = example_length(self.records, example, packing, self.vocabulary, self.bos)
            slot = int(reads_image(example.task))
            if length > packing.seq_len or slot > packing.images_per_row:
                num_dropped += 1
                continue
            fits = (r for r, left in room.items() if left[0] >= length and left[1] >= slot)
            row = next(fits, len(rows))
            if row == len(rows):
                rows.append([])
                room[row] = [packing.seq_len, packing.images_per_row]
                if len(room) > self.OPEN:
                    room.popitem(last=False)
            rows[row].append(example)
            left = room[row]
            left[0] -= length
            left[1] -= slot
            if left[0] < 4:
                room.pop(row, None)
        self.num_dropped = num_dropped
        if not rows:
            raise DataError(
                f"no example fits a row of {packing.seq_len} tokens and {packing.images_per_row} images; raise "
                "config.data.seq_len or config.data.images_per_row"
            )
        return rows


def build_row(
    examples: list[TokenizedExample], packing: PackingConfig, image_size: int, num_patches: int
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
        size = len(example.ids)
        span = slice(at, at + size)
        row["tokens"][span] = example.ids
        row["targets"][at : at + size - 1] = example.targets[1:]
        row["weights"][at : at + size - 1] = example.weights[1:]
        row["segments"][span] = segment
        row["positions"][span] = np.arange(size)
        if example.image is not None:
            shifted = np.where(example.feature >= 0, example.feature + slot * packing.max_image_tokens, IGNORED)
            row["feature_index"][span] = shifted
            row["images"][slot], row["keep"][slot] = example.image, example.keep
            slot += 1
        at += size
    return row


class RowSource:
    """The first `rows` rows of a plan as a random-access source for Grain; see `build_row` for their arrays."""

    def __init__(self, records: Records, packing: PackingConfig, vocabulary: Vocabulary, seed: int, rows: int):
        self.plan, self.rows = Plan(records, packing, vocabulary, seed), rows
        self.build = functools.partial(build_example, records, packing=packing, vocabulary=vocabulary)

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        records = self.plan.records
        examples = [self.build(e) for e in self.plan[index]]
        return build_row(examples, self.plan.packing, records.header["image_size"], records.header["num_patches"])
