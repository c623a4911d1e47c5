"""The stories benchmark: documents of test scenes that the model continues with texts and images, judged exactly."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from unimm_jax.config import ranged
from unimm_jax.data import scene_stories
from unimm_jax.data.scene_edits import SceneEdit, read_edit
from unimm_jax.data.scenes import Scene
from unimm_jax.evals.base import Context, Options, Result
from unimm_jax.evals.edits import rendered
from unimm_jax.evals.generation import EVALUATION_SEED, GeneratingEvaluator
from unimm_jax.evals.scene_detector import detect, edit_right
from unimm_jax.inference.generator import Generator
from unimm_jax.inference.interleaved import Parts, continue_document, document_prompt
from unimm_jax.inference.sampling import Sampling
from unimm_jax.plotting import enlarged, grid

OFFSET = 10_000_000  # of the indices of stories, so that their chains are none of the evaluator `edits`
MAX_IMAGES = 2  # per continued document
SHOWN = 16  # in the report


@dataclasses.dataclass(frozen=True)
class StoriesOptions(Options):
    """Options.

    Attributes:
      stories: number of stories.
      guidance: classifier-free guidance of the images, away from [IMG] alone; interleaved examples do not train it.
      temperature: of images and of the texts of continued documents; 0 is greedy.
    """

    stories: int = ranged(100, low=1)
    guidance: float = ranged(1.0, low=0)
    temperature: float = ranged(0.7, low=0)


class Stories(GeneratingEvaluator):
    """Stories of the test split. The stories and seeds are the same at every call and for every model.

    1. After caption, image and instruction, [IMG] is to be the most likely next token, and the image has to show the
       target of the instruction and nothing else (`story_image`). `story_image_start` is the share of [IMG] alone.
       `story_image_without_image` is the share of right images after caption and instruction without the image; there,
       an image is drawn in any case.
    2. After caption and image, the model continues the document freely, up to `MAX_IMAGES` images. A document is
       consistent (`story_consistent`) if it has a new image, and if texts and images alternate, each text an
       instruction that is possible in the scene, and each image right under the model's own instructions.
       `story_instruction` is the share of documents whose first text is such an instruction, `story_images` the mean
       number of new images.
    """

    options = StoriesOptions

    def score(self, generator: Generator, context: Context) -> Result:
        """See `GeneratingEvaluator.score`."""
        s: StoriesOptions = self.settings
        if not self.can_draw(generator, context, "continuing documents"):
            return Result({})
        sampling = Sampling(guidance=s.guidance, temperature=s.temperature)
        stories = [scene_stories.draw_story(EVALUATION_SEED, "test", OFFSET + i, 1) for i in range(s.stories)]
        edits = [story.edits[0] for story in stories]
        sources = rendered([edit.source for edit in edits], generator)
        begun: list[Parts] = [[story.caption, image] for story, image in zip(stories, sources, strict=True)]
        asked = [[*parts, edit.instruction] for parts, edit in zip(begun, edits, strict=True)]
        starts = [not text and drawn for text, drawn in generator.continue_until_image([*map(document_prompt, asked)])]
        right = judged_images(generator, asked, edits, sampling)
        blind = judged_images(generator, [[parts[0], parts[2]] for parts in asked], edits, sampling)
        free = continue_document(generator, begun, MAX_IMAGES, 2 * MAX_IMAGES, sampling, sampling, EVALUATION_SEED)
        steps = [judged_steps(edit.source, parts) for edit, parts in zip(edits, free, strict=True)]
        result = Result({}, settings={"story_sampling": dataclasses.asdict(sampling)})
        result.scores = {
            "story_image": float(np.mean(np.logical_and(starts, right))),
            "story_image_start": float(np.mean(starts)),
            "story_image_without_image": float(np.mean(blind)),
            "story_consistent": float(np.mean([is_consistent(found) for found in steps])),
            "story_instruction": float(np.mean([bool(found) and found[0].is_possible for found in steps])),
            "story_images": float(np.mean([sum(step.image is not None for step in found) for found in steps])),
        }
        result.examples["stories"] = [
            row(i, begun[i], steps[i], is_consistent(steps[i])) for i in range(min(SHOWN, len(steps)))
        ]
        return result


def judged_images(
    generator: Generator, prompts: Sequence[Parts], edits: Sequence[SceneEdit], sampling: Sampling
) -> list[bool]:
    """Whether the image that is drawn after each prompt is right after its edit."""
    ids = generator.continue_with_image([document_prompt(parts) for parts in prompts], sampling, EVALUATION_SEED)
    images = generator.decode(*generator.codes(ids), seed=EVALUATION_SEED)
    return [edit_right(edit, detect(image)) for edit, image in zip(edits, images, strict=True)]


@dataclasses.dataclass(frozen=True)
class Step:
    """A step of a continued document.

    Attributes:
      text: the instruction; "" if an image follows another one directly.
      image: what is drawn after it, uint8 [H, W, 3]; None if the document ends with the text.
      is_possible: whether the text is an instruction that is possible in the scene before it.
      is_right: whether the image shows the target of the instruction and nothing else. Both are False after a step that
        is not right, because the scene is then unknown.
    """

    text: str
    image: np.ndarray | None
    is_possible: bool
    is_right: bool


def judged_steps(scene: Scene, parts: Parts) -> list[Step]:
    """The steps of a continued document, each a text and the image after it.

    Args:
      scene: what the last image before them shows. parts: the new parts.
    """
    pairs: list[tuple[str, np.ndarray | None]] = []
    for part in parts:
        if isinstance(part, str):
            pairs.append((part, None))
        else:
            pairs.append((pairs.pop()[0] if pairs and pairs[-1][1] is None else "", part))
    steps: list[Step] = []
    free: frozenset[int] = frozenset()
    known = True
    for text, image in pairs:
        edit = read_edit(text, scene, free) if known else None
        known = edit is not None and image is not None and edit_right(edit, detect(image))
        steps.append(Step(text, image, edit is not None, known))
        if edit is not None:
            scene, free = edit.target, edit.free
    return steps


def is_consistent(steps: Sequence[Step]) -> bool:
    """Whether there is a step, and all are right."""
    return bool(steps) and all(step.is_right for step in steps)


def row(i: int, begun: Parts, steps: Sequence[Step], right: bool) -> dict[str, Any]:
    """An example for the report: the images of the document in order, and its texts."""
    caption, first = begun
    assert isinstance(caption, str) and not isinstance(first, str)
    images = [enlarged(image) for image in (first, *(step.image for step in steps)) if image is not None]
    found: dict[str, Any] = dict(file=f"story_{i:03d}.png", image=grid(images, len(images)), caption=caption)
    found |= dict(texts=[step.text for step in steps], marks=[step.is_right for step in steps], right=right)
    return found
