"""Examples of the language stages, their sizes, and rows of them as arrays. `data.plan` chooses what is in a row."""

import dataclasses

import numpy as np

from unimm_jax.data.documents import (
    IGNORED,
    Document,
    ImageOut,
    Layout,
    Tokens,
    fits_row,
    input_views,
    length,
    render,
    with_slices,
)
from unimm_jax.data.records import Records
from unimm_jax.data.slices import count_slices
from unimm_jax.data.tasks import REGISTRY, TaskSettings, get


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
      batch: examples per step, or mean number of tokens per step. batch_unit: which of them, "examples" or "tokens".
      seq_len: tokens per row T.
      images_per_row: input images per row R, slices included, for which the model computes features.
      max_image_tokens: maximum number of features per image S.
      image_size: side in pixels of the images that the model reads.
      weights: task → share of the examples in the first pass over the records.
      weights_end, epochs: shares in the last of `epochs` passes, interpolated linearly between; () keeps `weights`.
      tasks: settings of the tasks.
      sources: the mixture; () reads every record once per pass.
      max_slices, slice_grids, global_view_share: see `config.PackedDataConfig`.
    """

    batch: int
    seq_len: int
    images_per_row: int
    max_image_tokens: int
    weights: tuple[tuple[str, float], ...]
    weights_end: tuple[tuple[str, float], ...] = ()
    epochs: int = 1
    tasks: TaskSettings = TaskSettings()
    sources: tuple[SourceShare, ...] = ()
    batch_unit: str = "examples"
    image_size: int = 224
    max_slices: int = 0
    slice_grids: str = "illume"
    global_view_share: float = 0.0

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
    """An example in tokens, with its input views uint8 [S, S, 3] and their keep masks boolean [P]."""

    tokens: Tokens
    images: list[np.ndarray]
    keep: list[np.ndarray]


def document_of(records: Records, example: Example, packing: PackingConfig, layout: Layout) -> Document:
    """The document of an example, with the slices of its images.

    Images that the document also generates have no slices, because generation reads them in one size. If the slices do
    not fit a row, all images are read as a whole.
    """
    document, sliced = _document_and_slices(records, example, packing)
    return sliced if sliced is document or _fits(records, example, sliced, packing, layout) else document


def loses_slices(records: Records, example: Example, packing: PackingConfig, layout: Layout) -> bool:
    """Whether an example is read without its slices because they do not fit a row."""
    document, sliced = _document_and_slices(records, example, packing)
    return sliced != document and not _fits(records, example, sliced, packing, layout)


def _document_and_slices(records: Records, example: Example, packing: PackingConfig) -> tuple[Document, Document]:
    """The document of an example, and the same with slices; one object if it has none."""
    document = get(example.task).build(records.outline(example.record), example.variant, packing.tasks)
    if not packing.max_slices or _reads_global_view(example.variant, packing):
        return document, document
    sizes = records.sizes[example.record].reshape(-1, 2).tolist()
    slices = count_slices([(w, h) for w, h in sizes], packing.image_size, packing.max_slices, packing.slice_grids)
    for segment in document:
        if isinstance(segment, ImageOut):
            slices[segment.image] = 0
    return document, with_slices(document, slices) if any(slices) else document


def _fits(records: Records, example: Example, document: Document, packing: PackingConfig, layout: Layout) -> bool:
    """Whether a document of an example fits a row."""
    texts, kept = records.texts[example.record], records.kept[example.record]
    return fits_row(document, texts, kept, layout, packing.seq_len, packing.images_per_row)


def _tokens(records: Records, example: Example, document: Document, layout: Layout) -> int:
    return length(document, records.texts[example.record], records.kept[example.record], layout)


def _reads_global_view(variant: int, packing: PackingConfig) -> bool:
    """Whether an example reads its images without slices."""
    return (variant * 2654435761 >> 16) % 1000 < packing.global_view_share * 1000


def example_size(records: Records, example: Example, packing: PackingConfig, layout: Layout) -> tuple[int, int]:
    """Number of tokens and of input views of an example, from the index alone."""
    document = document_of(records, example, packing, layout)
    return _tokens(records, example, document, layout), len(input_views(document))


def build_example(records: Records, example: Example, packing: PackingConfig, layout: Layout) -> BuiltExample:
    """Reads the record of an example and renders its document."""
    item = records[example.record]
    tokens = render(document_of(records, example, packing, layout), item.texts, item.keep, item.codes, layout)
    sliced = {image for image, view in tokens.inputs if view}
    most = {image: packing.max_slices if image in sliced else 0 for image, _ in tokens.inputs}
    views = {
        image: records.views(example.record, image, packing.image_size, slices, packing.slice_grids)
        for image, slices in most.items()
    }
    images = [views[image][view] for image, view in tokens.inputs]
    if layout.view_features:
        return BuiltExample(tokens, images, [np.ones(layout.view_features, bool)] * len(images))
    return BuiltExample(tokens, images, [item.keep[image] for image, _ in tokens.inputs])


def build_row(examples: list[BuiltExample], packing: PackingConfig, num_patches: int) -> dict[str, np.ndarray]:
    """Concatenates examples into one row and pads it.

    Args:
      num_patches: length P of the keep masks.

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
        "images": np.zeros((packing.images_per_row, packing.image_size, packing.image_size, 3), np.uint8),
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
