"""Best of several images by the model's own assessment: it draws each prompt several times and keeps one image."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from unimm_jax.enhancement.verdicts import MAX_TOKENS, Verdict, from_text, question
from unimm_jax.errors import UserError
from unimm_jax.inference.generator import Generator
from unimm_jax.inference.sampling import SAMPLED, Sampling


@dataclasses.dataclass(frozen=True)
class Candidates:
    """Several images of each prompt.

    Attributes:
      images: uint8 [prompts, number, H, W, 3].
      verdicts: of the model on each image; None where its text is no verdict.
      chosen: index of the image that is kept, of each prompt.
    """

    images: np.ndarray
    verdicts: list[list[Verdict | None]]
    chosen: list[int]

    @property
    def best(self) -> np.ndarray:
        """The images that are kept, uint8 [prompts, H, W, 3]."""
        return self.images[np.arange(len(self.images)), self.chosen]


def best_images(
    generator: Generator, prompts: Sequence[str], number: int, sampling: Sampling = SAMPLED, seed: int = 0
) -> np.ndarray:
    """Prompts → images uint8 [N, H, W, 3], each the best of `number` images by the model's own assessment.

    Raises:
      UserError: a prompt longer than the generator takes. CheckpointError: there is no decoder.
    """
    return candidates(generator, prompts, number, sampling, seed).best


def candidates(
    generator: Generator,
    prompts: Sequence[str],
    number: int,
    sampling: Sampling = SAMPLED,
    seed: int = 0,
    decoder: str = "",
    size: tuple[int, int] | None = None,
) -> Candidates:
    """Draws `number` images of each prompt and assesses them; see `best_images` and `Generator.decode`."""
    repeated = [prompt for prompt in prompts for _ in range(number)]
    images = generator.generate_images(repeated, sampling, seed, decoder, size)
    found = [from_text(text) for text in assessments(generator, repeated, images)]
    verdicts = [found[at : at + number] for at in range(0, len(found), number)]
    return Candidates(images.reshape(len(prompts), number, *images.shape[1:]), verdicts, list(map(choose, verdicts)))


def assessments(generator: Generator, prompts: Sequence[str], images: np.ndarray) -> list[str]:
    """What the model says about images of prompts; see `verdicts.from_text`.

    Args:
      images: uint8 [N, H, W, 3].

    Raises:
      UserError: the generator's answers are too short for a verdict.
    """
    if generator.answer_length < MAX_TOKENS:
        raise UserError(
            f"a verdict has up to {MAX_TOKENS} tokens, and answers of this generator have {generator.answer_length}; "
            f"give Generator(..., answer_length={MAX_TOKENS})"
        )
    return generator.generate_text(generator.input_size(images), [question(prompt) for prompt in prompts])


def choose(verdicts: Sequence[Verdict | None]) -> int:
    """Index of the best image: the first good one, otherwise the first one with the most categories that fit."""
    return max(range(len(verdicts)), key=lambda i: (-1 if (v := verdicts[i]) is None else v.number_right, -i))
