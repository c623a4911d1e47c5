"""Documents: what the language model reads and writes, as segments of text and images, and their rendering to tokens.

A task (`unimm_jax.data.tasks`) turns a record into a document. `render` is the only place that lays a document out as
token ids; training, generation and evaluation call it. `length` counts the same tokens from stored counts.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from unimm_jax.text_tokenizer import TextTokenizer
from unimm_jax.vocabulary import Vocabulary

IGNORED = -1  # feature index of a position without an image feature


@dataclasses.dataclass(frozen=True)
class Text:
    """A text.

    Attributes:
      text: the text itself, or its index in the texts of the record.
      weight: loss weight of its tokens.
      is_markup: whether the text is from a template, where the names of special tokens stand for the tokens.
    """

    text: str | int
    weight: float = 0.0
    is_markup: bool = False


@dataclasses.dataclass(frozen=True)
class Special:
    """A special token of the text tokenizer: "bos" (no token if the tokenizer has none) or "eos"."""

    name: str
    weight: float = 0.0


@dataclasses.dataclass(frozen=True)
class ImageIn:
    """An image that is read: [IMG] features [/IMG].

    Attributes:
      image: its index in the images of the record.
      weight: loss weight of predicting its codes and [/IMG] at these positions (LaVIT's [image, text]; 0 in ILLUME).
      view: 0 is the whole image, i is its i-th slice (see `unimm_jax.data.slices`).
      start_weight: loss weight of predicting [IMG].
    """

    image: int
    weight: float = 0.0
    view: int = 0
    start_weight: float = 0.0


@dataclasses.dataclass(frozen=True)
class ImageOut:
    """An image that is generated: [IMG] codes [/IMG].

    Attributes:
      image: its index in the images of the record.
      weight: loss weight of its codes and [/IMG]. start_weight: loss weight of predicting [IMG].
    """

    image: int
    weight: float = 1.0
    start_weight: float = 0.0


@dataclasses.dataclass(frozen=True)
class ImageCodes:
    """The codes of an image, without [IMG] and [/IMG] around them: an image in LaVIT's prompts for images.

    Attributes:
      image: its index in the images of the record.
      weight: loss weight of its codes.
    """

    image: int
    weight: float = 0.0


@dataclasses.dataclass(frozen=True)
class ImageStart:
    """[IMG] alone: the end of a prompt whose continuation is an image."""


Segment = Text | Special | ImageIn | ImageOut | ImageCodes | ImageStart
Document = tuple[Segment, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How documents become tokens.

    Attributes:
      vocabulary: token ids. text_tokenizer: encodes the texts, each on its own.
      max_image_tokens: maximum number of kept tokens per image S; the first ones in raster order are used. With
        `view_features`, the number of features, and generated images have all of their codes.
      view_features: number of features of every image that is read, where the connector gives all of them; 0 where it
        gives those of kept patches.
    """

    vocabulary: Vocabulary
    text_tokenizer: TextTokenizer
    max_image_tokens: int
    view_features: int = 0

    @property
    def max_codes(self) -> int | None:
        """Maximum number of codes of a generated image; None for all."""
        return None if self.view_features else self.max_image_tokens

    @functools.cached_property
    def _counts(self) -> dict[tuple[str, bool], int]:
        return {}

    def count(self, text: str, is_markup: bool) -> int:
        """Number of tokens of a text that is not stored in a record; cached."""
        if (text, is_markup) not in self._counts:
            self._counts[text, is_markup] = len(self.encode(text, is_markup))
        return self._counts[text, is_markup]

    def encode(self, text: str, is_markup: bool) -> tuple[int, ...]:
        """Token ids of a text; see `TextTokenizer`."""
        return (self.text_tokenizer.encode_markup if is_markup else self.text_tokenizer.encode)(text)


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A rendered document. `ids`, `targets`, `weights` and `feature` are [T], T being its length.

    Attributes:
      ids: token ids, int32.
      targets: target of predicting each position, int32: its id, or its code where the input is an image feature.
      weights: loss weight of predicting each position, float32.
      feature: slot · S + index of the feature in its view, or IGNORED, int32. The slot counts the input views.
      inputs: the input views in order: (index of the record's image, view).
    """

    ids: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    feature: np.ndarray
    inputs: tuple[tuple[int, int], ...]


def input_views(document: Document) -> tuple[tuple[int, int], ...]:
    """The views that a document reads, in order: (index of the record's image, view)."""
    return tuple((segment.image, segment.view) for segment in document if isinstance(segment, ImageIn))


def with_slices(document: Document, slices: Sequence[int]) -> Document:
    """A document in which every image that is read is followed by its slices. These are not in the loss.

    Args:
      slices: number of slices of each image of the record; 0 for images that are read as a whole only.
    """
    found: list[Segment] = []
    for segment in document:
        found.append(segment)
        if isinstance(segment, ImageIn):
            plain = dataclasses.replace(segment, weight=0.0, start_weight=0.0)
            found += [dataclasses.replace(plain, view=1 + i) for i in range(slices[segment.image])]
    return tuple(found)


def prompt_images(document: Document) -> tuple[int, ...]:
    """The images of a prompt: first those that it reads, then those of which it has the codes alone, each in order."""
    coded = tuple(segment.image for segment in document if isinstance(segment, ImageCodes))
    return tuple(image for image, view in input_views(document) if not view) + coded


def length(
    document: Document, text_counts: Sequence[int] | np.ndarray, kept: Sequence[int] | np.ndarray, layout: Layout
) -> int:
    """Number of tokens of a document, equal to that of `render`.

    Args:
      text_counts: number of tokens of each text of the record.
      kept: number of kept patches of each image of the record.
    """
    each = 2 if layout.vocabulary.num_position_ids else 1
    has_bos = layout.text_tokenizer.bos is not None
    total = 0
    for segment in document:
        if isinstance(segment, Text):
            text = segment.text
            total += layout.count(text, segment.is_markup) if isinstance(text, str) else int(text_counts[text])
        elif isinstance(segment, ImageIn) and layout.view_features:
            total += 2 + layout.view_features
        elif isinstance(segment, ImageIn | ImageOut):
            total += 2 + _codes_of(kept[segment.image], layout) * each
        elif isinstance(segment, ImageCodes):
            total += _codes_of(kept[segment.image], layout) * each
        elif isinstance(segment, ImageStart):
            total += 1
        else:
            total += 1 if segment.name == "eos" else has_bos
    return total


def fits_row(
    document: Document,
    text_counts: Sequence[int] | np.ndarray,
    kept: Sequence[int] | np.ndarray,
    layout: Layout,
    seq_len: int,
    images_per_row: int,
) -> bool:
    """Whether a document fits a row of training. If one with slices does not, its images are read as a whole.

    Args:
      text_counts, kept: see `length`. seq_len, images_per_row: maximum number of tokens and of input views.
    """
    return len(input_views(document)) <= images_per_row and length(document, text_counts, kept, layout) <= seq_len


def _codes_of(kept: int, layout: Layout) -> int:
    """Number of codes of an image with so many kept patches."""
    return int(kept) if layout.max_codes is None else min(int(kept), layout.max_codes)


def render(
    document: Document,
    texts: Sequence[str],
    keep: Sequence[np.ndarray] | np.ndarray,
    codes: Sequence[np.ndarray] | np.ndarray,
    layout: Layout,
) -> Tokens:
    """Lays a document out as tokens.

    Features and codes are in raster order; with position ids, each follows the id of its patch position.

    Args:
      texts: texts of the record.
      keep: keep mask of each image of the record, boolean [P].
      codes: codes of each image, int32 [P]; used for images that are generated, for `ImageCodes`, and as targets of
        images that are read.
    """
    vocabulary, tokenizer = layout.vocabulary, layout.text_tokenizer
    ids: list[int] = []
    targets: list[int] = []
    weights: list[float] = []
    feature: list[int] = []
    inputs: list[tuple[int, int]] = []

    def put(tokens: Sequence[int], weight: float) -> None:
        ids.extend(tokens)
        targets.extend(tokens)
        weights.extend([weight] * len(tokens))
        feature.extend([IGNORED] * len(tokens))

    for segment in document:
        if isinstance(segment, Text):
            text = segment.text if isinstance(segment.text, str) else texts[segment.text]
            put(layout.encode(text, segment.is_markup), segment.weight)
        elif isinstance(segment, Special):
            token = getattr(tokenizer, segment.name)
            put([] if token is None else [token], segment.weight)
        elif isinstance(segment, ImageStart):
            put([vocabulary.start], 0.0)
        else:
            patches = np.flatnonzero(keep[segment.image])[: layout.max_codes]
            written = vocabulary.write_image(patches, codes[segment.image][patches]).tolist()
            if isinstance(segment, ImageCodes):
                put(written, segment.weight)
                continue
            put([vocabulary.start], segment.start_weight)
            if isinstance(segment, ImageOut):
                put(written, segment.weight)
            else:
                places, rows = _place_features(patches, layout)
                first = len(inputs) * layout.max_image_tokens
                ids.extend(places.tolist())
                # without a code for each feature, the weight is 0: other configs are refused
                targets.extend(written if len(written) == len(places) else places.tolist())
                weights.extend([segment.weight] * len(places))
                feature.extend(np.where(rows >= 0, rows + first, IGNORED).tolist())
                inputs.append((segment.image, segment.view))
            put([vocabulary.end], segment.weight)
    return Tokens(
        np.array(ids, np.int32),
        np.array(targets, np.int32),
        np.array(weights, np.float32),
        np.array(feature, np.int32),
        tuple(inputs),
    )


def _place_features(patches: np.ndarray, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Positions of an input view: (ids, feature index), as `Vocabulary.place_features` gives them."""
    if not layout.view_features:
        return layout.vocabulary.place_features(patches)
    rows = np.arange(layout.view_features, dtype=np.int32)
    return np.full(len(rows), layout.vocabulary.start, np.int32), rows
