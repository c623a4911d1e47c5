"""Questions about small objects in large scenes, read with slices and as a whole only."""

import dataclasses
from typing import Any

import numpy as np

from unimm_jax.config import Config, ranged
from unimm_jax.data import scenes, tasks
from unimm_jax.evals import scene_detector as detector
from unimm_jax.evals.base import Context, Options, Result
from unimm_jax.evals.bootstrap import paired_bootstrap
from unimm_jax.evals.generation import EVALUATION_SEED, GeneratingEvaluator
from unimm_jax.evals.scenes import with_overall
from unimm_jax.inference.generator import Generator, Prompt

SHOWN = 12  # questions in the report


@dataclasses.dataclass(frozen=True)
class SmallObjectsOptions(Options):
    """Options.

    Attributes:
      small_questions: questions per kind.
      side: side of the scenes in pixels. scale: of the objects' radius; see `scenes.scaled`.
      small_jitter: of their places; see `scenes.draw_scene`.
    """

    small_questions: int = ranged(100, low=1)
    side: int = ranged(192, low=16)
    scale: float = ranged(0.35, low=0.01, high=1)
    small_jitter: float = ranged(1.0, low=0)


class SmallObjects(GeneratingEvaluator):
    """Questions about test scenes; the same at every call and for every model.

    Each is asked twice: with the slices of the image, and with the whole image alone. "difference" is slices − whole
    image, "interval" its 95% interval by a paired bootstrap over the questions.
    """

    options = SmallObjectsOptions

    @classmethod
    def check(cls, config: Config) -> list[str]:
        """See `Evaluator.check`."""
        found = super().check(config)
        if not found and not config.data.max_slices:
            found = [f"it needs a model that reads slices; config.data.max_slices of {config.name} is 0"]
        return found

    def score(self, generator: Generator, context: Context) -> Result:
        """See `GeneratingEvaluator.score`."""
        s: SmallObjectsOptions = self.settings
        asked = detector.question_set(EVALUATION_SEED, s.small_questions, s.small_jitter)
        found = {index: scenes.draw_scene(EVALUATION_SEED, "test", index, s.small_jitter) for index, *_ in asked}
        images = {index: scenes.render(scenes.scaled(scene, s.scale), s.side) for index, scene in found.items()}
        replies = {}
        for view, slices in (("slices", True), ("global_view", False)):
            prompts = [
                Prompt(tasks.question_prompt(question, generator.task_settings), [images[index]], slices)
                for index, question, _, _ in asked
            ]
            replies[view] = generator.continue_with_text(prompts)
        scores: dict[str, Any] = {}
        outcomes: dict[str, list[bool]] = {}
        for view, answers in replies.items():
            kinds: dict[str, list[bool]] = {kind: [] for kind in scenes.QUESTION_KINDS}
            outcomes[view] = [answer == truth for (_, _, truth, _), answer in zip(asked, answers, strict=True)]
            for (*_, kind), ok in zip(asked, outcomes[view], strict=True):
                kinds[kind].append(ok)
            scores[f"{view}_by_kind"] = with_overall({kind: float(np.mean(right)) for kind, right in kinds.items()})
            scores[view] = scores[f"{view}_by_kind"]["overall"]
        read, seen = (np.array(outcomes[view]) for view in ("slices", "global_view"))
        gain = paired_bootstrap([read], [seen], seed=EVALUATION_SEED)
        scores |= {"difference": gain.mean, "interval": [gain.low, gain.high]}
        settings = dict(side=s.side, scale=s.scale, jitter=s.small_jitter)
        settings = {f"small_objects_{name}": value for name, value in settings.items()}
        result = Result(
            {"small_objects": scores},
            settings=settings,
            outcomes={f"small_objects/{view}": outcomes[view] for view in outcomes},
        )
        result.examples["small_objects"] = [
            dict(file=f"small_{i:02d}.png", image=images[index], question=question, truth=truth)
            | {view: answers[i] for view, answers in replies.items()}
            for i, (index, question, truth, _) in list(enumerate(asked))[:: max(len(asked) // SHOWN, 1)]
        ]
        return result
