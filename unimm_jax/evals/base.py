"""What an evaluator is."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import numpy as np

from unimm_jax.config import Config, ranged
from unimm_jax.text_tokenizer import TextTokenizer


@dataclasses.dataclass(frozen=True)
class Options:
    """Options that every evaluator has; subclasses add their own.

    Attributes:
      every: interval in training steps; 0 evaluates after the last step only. It also runs after the last step.
    """

    every: int = ranged(0, low=0)


@dataclasses.dataclass
class Context:
    """What is evaluated.

    Attributes:
      config: of the stage. objective: its objective. params: parameters as a nested dict. step: of the parameters.
      mesh: what the parameters lie on. workdir: paths of the config are relative to it.
      header: header of the stage's data. text_tokenizer: None where the stage has no text.
    """

    config: Config
    objective: Any
    params: Any
    step: int
    mesh: jax.sharding.Mesh
    workdir: pathlib.Path
    header: dict[str, Any]
    text_tokenizer: TextTokenizer | None


@dataclasses.dataclass
class Result:
    """What an evaluation found.

    Attributes:
      scores: nested dict of numbers (and of strings that describe them), for `scores.json` and TensorBoard.
      images: sheets to look at, name → uint8 [H, W, 3]; also shown in TensorBoard.
      examples: lists of single results for the report, by kind. A result with an image has it in "image" (uint8
        [H, W, 3]) and its file name in "file".
      settings: how the scores were measured; in `scores.json` only.
      outcomes: whether each example is right, by score (named as by `scalars`). The examples are the same for every
        model, so outcomes can be compared in pairs (`bootstrap.paired_bootstrap`).
    """

    scores: dict[str, Any]
    images: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    examples: dict[str, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    outcomes: dict[str, Sequence[bool]] = dataclasses.field(default_factory=dict)

    def add(self, other: "Result") -> None:
        """Adds the parts of another result."""
        self.scores |= other.scores
        self.images |= other.images
        self.examples |= other.examples
        self.settings |= other.settings
        self.outcomes |= other.outcomes

    def scalars(self) -> dict[str, float]:
        """All numbers of `scores`, nested names joined by "/"."""
        found: dict[str, float] = {}

        def walk(value: Any, name: str) -> None:
            if isinstance(value, dict):
                for key, item in value.items():
                    walk(item, f"{name}/{key}" if name else key)
            elif isinstance(value, int | float) and not isinstance(value, bool):
                found[name] = float(value)

        walk(self.scores, "")
        return found


class Evaluator:
    """Base of all evaluators.

    Attributes:
      options: dataclass of the evaluator's options, a subclass of `Options`.
    """

    options: ClassVar[type] = Options

    def __init__(self, options: Any):
        self.settings = options

    @classmethod
    def check(cls, config: Config) -> list[str]:
        """A sentence for every reason why the evaluator cannot run on a stage with this config."""
        del config
        return []

    def run(self, context: Context) -> Result:
        """Evaluates the parameters.

        Raises:
          UserError: data or companions that the evaluator needs are missing.
        """
        raise NotImplementedError
