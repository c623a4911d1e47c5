"""The compositions benchmark: images from prompts of an image and a text, or of two images, judged exactly."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from unimm_jax.config import one_of, ranged
from unimm_jax.data import scene_compositions, scenes, tasks
from unimm_jax.data.scene_compositions import Composition
from unimm_jax.evals.base import Context, Options, Result
from unimm_jax.evals.generation import EVALUATION_SEED, GeneratingEvaluator
from unimm_jax.evals.scene_detector import detect, looks_right
from unimm_jax.evals.scenes import with_overall
from unimm_jax.inference.generator import Generator
from unimm_jax.inference.sampling import Sampling
from unimm_jax.plotting import enlarged, grid

SHOWN = 16  # in the report


@dataclasses.dataclass(frozen=True)
class CompositionsOptions(Options):
    """Options.

    Attributes:
      compositions: number of prompts, at least 4; the kinds take turns.
      image_prompts: layout of the prompts, see `tasks.image_prompt`; that of the model if empty.
      guidance: classifier-free guidance, away from an image without a prompt. temperature: 0 is greedy.
    """

    compositions: int = ranged(100, low=4)
    image_prompts: str = one_of("", "", *tasks.IMAGE_PROMPTS)
    guidance: float = ranged(1.25, low=0)
    temperature: float = ranged(0.7, low=0)


class Compositions(GeneratingEvaluator):
    """Prompts with scenes of the test split; the same at every call and for every model.

    An image is right if it has the objects of all parts of the prompt, anywhere, and nothing else. Beside the score
    stand those of the same prompts without their first and without their second part, and with that part of another
    prompt of the same kind.
    """

    options = CompositionsOptions

    def score(self, generator: Generator, context: Context) -> Result:
        """See `GeneratingEvaluator.score`."""
        s: CompositionsOptions = self.settings
        if not self.can_draw(generator, context, "composition"):
            return Result({})
        sampling = Sampling(guidance=s.guidance, temperature=s.temperature)
        layout = s.image_prompts or generator.config.data.image_prompts
        found = [scene_compositions.draw_composition(EVALUATION_SEED, "test", i) for i in range(s.compositions)]
        prompts = [prompt_of(item, generator.config.data.image_size) for item in found]

        def right(prompts: Sequence[Sequence[np.ndarray | str]]) -> tuple[np.ndarray, list[bool]]:
            made = generator.compose_images(prompts, sampling, EVALUATION_SEED, image_prompts=layout)
            return made, [looks_right(item.target, detect(image)) for item, image in zip(found, made, strict=True)]

        same_kind = [[j for j, other in enumerate(found) if other.kind == item.kind] for item in found]
        others = [prompts[same[same.index(i) - 1]] for i, same in enumerate(same_kind)]
        pairs = list(zip(prompts, others, strict=True))
        controls = {
            "without_first": [prompt[1:] for prompt in prompts],
            "without_second": [prompt[:1] for prompt in prompts],
            "other_first": [[other[0], *prompt[1:]] for prompt, other in pairs],
            "other_second": [[prompt[0], *other[1:]] for prompt, other in pairs],
        }
        made, whole = right(prompts)
        kinds = {
            kind: float(np.mean([ok for item, ok in zip(found, whole, strict=True) if item.kind == kind]))
            for kind in scene_compositions.KINDS
        }
        result = Result({})
        result.settings = {"composition_sampling": dataclasses.asdict(sampling), "composition_image_prompts": layout}
        result.scores = {
            "composition": float(np.mean(whole)),
            **{f"composition_{name}": float(np.mean(right(changed)[1])) for name, changed in controls.items()},
            "composition_by_kind": with_overall(kinds),
        }
        result.outcomes["composition"] = whole
        result.examples["compositions"] = [
            row(i, found[i], prompts[i], made[i], whole[i]) for i in range(min(SHOWN, len(found)))
        ]
        return result


def prompt_of(item: Composition, size: int) -> list[np.ndarray | str]:
    """The prompt with its images, uint8 [S, S, 3]."""
    return [part if isinstance(part, str) else scenes.render(item.images[part], size) for part in item.parts]


def row(i: int, item: Composition, prompt: list[np.ndarray | str], made: np.ndarray, ok: bool) -> dict[str, Any]:
    """An example for the report: the images of the prompt and, last, the result."""
    images = [enlarged(part) for part in prompt if not isinstance(part, str)]
    text = " ".join(part if isinstance(part, str) else "<image>" for part in prompt)
    sheet = grid([*images, enlarged(made)], len(images) + 1)
    return dict(file=f"composition_{i:03d}.png", image=sheet, kind=item.kind, prompt=text, right=bool(ok))
