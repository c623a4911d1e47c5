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
    """

    text: str | int
    weight: float = 0.0


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
    """

    image: int
    weight: float = 0.0


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
      max_image_tokens: maximum number of kept tokens per image S; the first ones in raster order are used.
    """

    vocabulary: Vocabulary
    text_tokenizer: TextTokenizer
    max_image_tokens: int

    @functools.cached_property
    def _counts(self) -> dict[str, int]:
        return {}

    def count(self, text: str) -> int:
        """Number of tokens of a text that is not stored in a record (of a template); cached."""
        if text not in self._counts:
            self._counts[text] = len(self.text_tokenizer.encode(text))
        return self._counts[text]


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A rendered document. `ids`, `targets`, `weights` and `feature` are [T], T being its length.

    Attributes:
      ids: token ids, int32.
      targets: target of predicting each position, int32: its id, or its code where the input is an image feature.
      weights: loss weight of predicting each position, float32.
      feature: slot · S + index of the feature in its image, or IGNORED, int32. The slot counts the input images.
      inputs: the input images in order, as indices of the record's images.
    """

    ids: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    feature: np.ndarray
    inputs: tuple[int, ...]


def input_images(document: Document) -> tuple[int, ...]:
    """The images that a document reads, in order, as indices of the record's images."""
    return tuple(segment.image for segment in document if isinstance(segment, ImageIn))


def prompt_images(document: Document) -> tuple[int, ...]:
    """The images of a prompt: first those that it reads, then those of which it has the codes alone, each in order."""
    coded = tuple(segment.image for segment in document if isinstance(segment, ImageCodes))
    return input_images(document) + coded


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
            total += layout.count(text) if isinstance(text, str) else int(text_counts[text])
        elif isinstance(segment, ImageIn | ImageOut):
            total += 2 + min(int(kept[segment.image]), layout.max_image_tokens) * each
        elif isinstance(segment, ImageCodes):
            total += min(int(kept[segment.image]), layout.max_image_tokens) * each
        elif isinstance(segment, ImageStart):
            total += 1
        else:
            total += 1 if segment.name == "eos" else has_bos
    return total


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
    inputs: list[int] = []

    def put(tokens: Sequence[int], weight: float) -> None:
        ids.extend(tokens)
        targets.extend(tokens)
        weights.extend([weight] * len(tokens))
        feature.extend([IGNORED] * len(tokens))

    for segment in document:
        if isinstance(segment, Text):
            text = segment.text if isinstance(segment.text, str) else texts[segment.text]
            put(tokenizer.encode(text), segment.weight)
        elif isinstance(segment, Special):
            token = getattr(tokenizer, segment.name)
            put([] if token is None else [token], segment.weight)
        elif isinstance(segment, ImageStart):
            put([vocabulary.start], 0.0)
        else:
            patches = np.flatnonzero(keep[segment.image])[: layout.max_image_tokens]
            written = vocabulary.write_image(patches, codes[segment.image][patches]).tolist()
            if isinstance(segment, ImageCodes):
                put(written, segment.weight)
                continue
            if isinstance(segment, ImageOut):
                put([vocabulary.start], segment.start_weight)
                put(written, segment.weight)
            else:
                put([vocabulary.start], 0.0)
                places, rows = vocabulary.place_features(patches)
                first = len(inputs) * layout.max_image_tokens
                ids.extend(places.tolist())
                targets.extend(written)
                weights.extend([segment.weight] * len(places))
                feature.extend(np.where(rows >= 0, rows + first, IGNORED).tolist())
                inputs.append(segment.image)
            put([vocabulary.end], segment.weight)
    return Tokens(
        np.array(ids, np.int32),
        np.array(targets, np.int32),
        np.array(weights, np.float32),
        np.array(feature, np.int32),
        tuple(inputs),
    )
