"""Continues documents in which texts and images alternate: the model writes, draws, and reads what it drew."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from unimm_jax.data import tasks
from unimm_jax.errors import UserError
from unimm_jax.inference.generator import Generator, Prompt, numbered, with_start
from unimm_jax.inference.sampling import GREEDY, SAMPLED, Sampling

Parts = list[str | np.ndarray]  # texts, and images uint8 [H, W, 3]


@dataclasses.dataclass(eq=False)
class Draft:
    """A document that is being continued.

    Attributes:
      stream: its index, which numbers its random numbers.
      parts: its parts as the model reads them, images uint8 [S, S, 3]. added: the new ones, images as decoded.
    """

    stream: int
    parts: Parts
    added: Parts = dataclasses.field(default_factory=list)

    @property
    def images_added(self) -> int:
        """Number of new images."""
        return sum(not isinstance(part, str) for part in self.added)

    def add(self, part: str | np.ndarray, read: str | np.ndarray) -> None:
        """Adds a part, and what the model reads of it."""
        self.added.append(part)
        self.parts.append(read)


def document_prompt(parts: Sequence[str | np.ndarray]) -> Prompt:
    """A document so far, of texts and images uint8 [S, S, 3], laid out as in training."""
    document, images = numbered(parts)
    return Prompt(tasks.interleaved_prompt(document), images)


def continue_document(
    generator: Generator,
    prompts: Sequence[Sequence[str | np.ndarray]],
    max_images: int = 4,
    max_parts: int = 8,
    text_sampling: Sampling = GREEDY,
    image_sampling: Sampling = SAMPLED,
    seed: int = 0,
    decoder: str = "",
) -> list[Parts]:
    """Continues documents of texts and images with both.

    In each round, every document that has not ended first gets a text, up to [IMG] or </s>; the text may be empty.
    Where [IMG] follows, an image is generated. From then on, its features are read, as in the task `interleaved`. After
    a prompt that ends with a text, the first text continues it. A document ends at </s>, at a limit (also
    `generator.prompt_length`), or after a text of `generator.answer_length` tokens. Guidance is away from [IMG] alone.

    With the pixel decoder, the parts depend on the prompt, the seed and the index, not on the other prompts. The U-Net
    decoders draw their noise by the place in a batch.

    Args:
      prompts: the documents' first parts: texts, and images uint8 [S, S, 3]. Each has at least one part.
      max_images: images per document; [IMG] ends a document that has so many new ones.
      max_parts: new texts and images per document.
      text_sampling: without beam search.
      decoder: one of `loading.DECODERS`; the first one present if empty.

    Returns:
      the new parts of each document, in order. Images are uint8 [H, W, 3] in the size of the decoder.

    Raises:
      UserError: a prompt without parts, a document longer than `generator.prompt_length`, or beam search.
      CheckpointError: no such decoder.
    """
    if not all(any(not isinstance(part, str) or part for part in prompt) for prompt in prompts):
        raise UserError("a document to continue has neither text nor image; give it one")
    decoder = generator.decoder_name(decoder)
    drafts = [
        Draft(i, [part for part in parts if not isinstance(part, str) or part]) for i, parts in enumerate(prompts)
    ]
    active = drafts
    while active := [draft for draft in active if len(draft.added) < max_parts]:
        active = _write(generator, active, text_sampling, seed)
        active = [draft for draft in active if draft.images_added < max_images and len(draft.added) < max_parts]
        active = _draw(generator, active, image_sampling, seed + 1, decoder)
        seed += 2  # texts and images of each round have a seed of their own
    return [draft.added for draft in drafts]


def _write(generator: Generator, drafts: list[Draft], sampling: Sampling, seed: int) -> list[Draft]:
    """Adds the next text of each document, if it has one. Returns the documents that go on with an image."""
    # a document that is too long as it was given raises an error
    drafts = [draft for draft in drafts if not draft.added or generator.fits(document_prompt(draft.parts))]
    if not drafts:
        return []
    streams = [draft.stream for draft in drafts]
    found = generator.continue_until_image([document_prompt(draft.parts) for draft in drafts], sampling, seed, streams)
    for draft, (text, _) in zip(drafts, found, strict=True):
        if text:
            draft.add(text, text)
    return [draft for draft, (_, starts_image) in zip(drafts, found, strict=True) if starts_image]


def _draw(generator: Generator, drafts: list[Draft], sampling: Sampling, seed: int, decoder: str) -> list[Draft]:
    """Adds an image to each document that has room for its [IMG]. Returns these documents; the others end."""
    drafts = [draft for draft in drafts if generator.fits(with_start(document_prompt(draft.parts)))]
    if not drafts:
        return []
    prompts, streams = [document_prompt(draft.parts) for draft in drafts], [draft.stream for draft in drafts]
    codes = generator.codes(generator.continue_with_image(prompts, sampling, seed, streams=streams))
    images = generator.decode(*codes, decoder, seed)
    for draft, image, read in zip(drafts, images, generator.input_size(images), strict=True):
        draft.add(image, read)
    return drafts
