"""The assessments benchmark: how well the model assesses its own images, and what choosing by it is worth.

The truth is the exact judge of the scenes (`enhancement.judge_scenes`).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from unimm_jax.config import ranged
from unimm_jax.data import scenes
from unimm_jax.data.scene_language import parse
from unimm_jax.enhancement.judge_scenes import verdict_on
from unimm_jax.enhancement.verdicts import CATEGORIES, MAX_TOKENS, Verdict, from_text
from unimm_jax.evals.base import Context, Options, Result
from unimm_jax.evals.bootstrap import paired_bootstrap
from unimm_jax.evals.generation import EVALUATION_SEED, GeneratingEvaluator
from unimm_jax.evals.scene_detector import detect
from unimm_jax.inference.best_of import assessments, candidates
from unimm_jax.inference.generator import Generator
from unimm_jax.inference.sampling import Sampling
from unimm_jax.plotting import enlarged

ROUNDS = 4  # at most, of as many drawings as there are to be in the end
SAMPLES = 4  # of each prompt, for the best of them
SHOWN = 24  # in the report


@dataclasses.dataclass(frozen=True)
class AssessmentsOptions(Options):
    """Options.

    Attributes:
      drawings: number of images to assess, half of them right and half wrong if there are enough.
      best_of: number of prompts of which the best of several images is chosen.
      guidance: classifier-free guidance of the images. temperature: of the images; 0 is greedy.
    """

    drawings: int = ranged(400, low=2)
    best_of: int = ranged(100, low=1)
    guidance: float = ranged(1.5, low=0)
    temperature: float = ranged(1.0, low=0)


@dataclasses.dataclass(frozen=True)
class Assessed:
    """A drawn image, uint8 [H, W, 3], its prompt, and the verdict of the exact judge."""

    prompt: str
    image: np.ndarray
    truth: Verdict


class Assessments(GeneratingEvaluator):
    """Assessments of images for captions of test scenes; captions and seeds are the same at every call.

    A text that is no verdict counts as wrong, in all categories. The best of several images is chosen for the prompts
    of the six text-to-image tasks, and judged by the strict rule: the image shows what the prompt names and nothing
    else.
    """

    options = AssessmentsOptions
    answer_length = MAX_TOKENS

    def score(self, generator: Generator, context: Context) -> Result:
        """See `GeneratingEvaluator.score`."""
        s: AssessmentsOptions = self.settings
        if not self.can_draw(generator, context, "assessment"):
            return Result({})
        sampling = Sampling(guidance=s.guidance, temperature=s.temperature)
        items = balanced(generator, s.drawings, sampling)
        texts = assessments(generator, [item.prompt for item in items], np.stack([item.image for item in items]))
        found = [from_text(text) for text in texts]
        chosen, outcomes = best_of(generator, s.best_of, sampling)
        result = Result(agreement(items, found) | {f"best_of_{SAMPLES}": chosen}, outcomes=outcomes)
        result.settings = {"assessment_sampling": dataclasses.asdict(sampling)}
        shown = np.linspace(0, len(items) - 1, min(SHOWN, len(items))).astype(int).tolist()
        result.examples["assessments"] = [row(n, items[i], texts[i], found[i]) for n, i in enumerate(shown)]
        return result


def balanced(generator: Generator, number: int, sampling: Sampling) -> list[Assessed]:
    """Images for captions of test scenes, right ones first: half of them right, if `ROUNDS` rounds give enough."""
    sides: dict[bool, list[Assessed]] = {True: [], False: []}
    half = number // 2
    for start in range(0, ROUNDS * number, number):
        prompts = [caption(i) for i in range(start, start + number)]
        images = generator.generate_images(prompts, sampling, EVALUATION_SEED + start)
        for prompt, image in zip(prompts, images, strict=True):
            truth = verdict_on(parse(prompt), detect(image))
            sides[truth.good].append(Assessed(prompt, image, truth))
        if min(map(len, sides.values())) >= half:
            break
    return sides[True][:half] + sides[False][:half]


def caption(index: int) -> str:
    """A caption of test scene `index`."""
    texts = scenes.captions(scenes.draw_scene(EVALUATION_SEED, "test", index))
    return texts[np.random.default_rng([EVALUATION_SEED, index, 74]).integers(len(texts))]


def agreement(items: Sequence[Assessed], found: Sequence[Verdict | None]) -> dict[str, Any]:
    """How often the model's verdicts are those of the exact judge, overall, by side and by category."""
    pairs = list(zip(items, found, strict=True))
    same = [verdict is not None and verdict.good == item.truth.good for item, verdict in pairs]
    right = [ok for item, ok in zip(items, same, strict=True) if item.truth.good]
    wrong = [ok for item, ok in zip(items, same, strict=True) if not item.truth.good]
    by_category = {
        name: float(np.mean([v is not None and v.category(name) == item.truth.category(name) for item, v in pairs]))
        for name in CATEGORIES
    }
    by_side = {name: float(np.mean(side)) for name, side in (("right", right), ("wrong", wrong)) if side}
    return {
        "assessment_agreement": float(np.mean(same)),
        "assessment_agreement_by_side": by_side,
        "assessment_agreement_by_category": by_category,
        "assessment_unparsed": float(np.mean([verdict is None for verdict in found])),
        "assessment_drawings": {"right": len(right), "wrong": len(wrong)},
    }


def best_of(generator: Generator, number: int, sampling: Sampling) -> tuple[dict[str, Any], dict[str, Sequence[bool]]]:
    """Share of the prompts whose image is right: of the first image, of the chosen one, and of any of them.

    "difference" is chosen − first, "interval" its 95% interval by a paired bootstrap over the prompts. The second value
    says of each prompt whether the first image and the chosen one are right.
    """
    tasks = len(scenes.TASKS)
    items = [scenes.draw_prompt(scenes.TASKS[i % tasks], EVALUATION_SEED, i // tasks) for i in range(number)]
    found = candidates(generator, [item.text for item in items], SAMPLES, sampling, EVALUATION_SEED)
    right = np.array(
        [
            [verdict_on(parse(item.text), detect(image)).good for image in images]
            for item, images in zip(items, found.images, strict=True)
        ]
    )
    first, chosen = right[:, 0], right[np.arange(number), found.chosen]
    gain = paired_bootstrap([chosen], [first], seed=EVALUATION_SEED)
    scores = {
        "one_sample": float(first.mean()),
        f"best_of_{SAMPLES}": float(chosen.mean()),
        "oracle": float(right.any(-1).mean()),
        "difference": gain.mean,
        "interval": [gain.low, gain.high],
    }
    name = f"best_of_{SAMPLES}"
    return scores, {f"{name}/one_sample": first.tolist(), f"{name}/{name}": chosen.tolist()}


def row(number: int, item: Assessed, text: str, found: Verdict | None) -> dict[str, Any]:
    """An example for the report: the image, its prompt, what the model says, and the right verdict."""
    agrees = found is not None and found.good == item.truth.good
    example = dict(file=f"assessment_{number:03d}.png", image=enlarged(item.image), prompt=item.prompt)
    return example | dict(reply=text, truth=item.truth.to_text(), right=agrees)
