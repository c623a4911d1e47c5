"""Confidence intervals of differences between two models or methods on the same items."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

REPLICATES = 10_000


@dataclasses.dataclass(frozen=True)
class Difference:
    """A difference a - b between two arms.

    Attributes:
      mean: mean over the seeds of the mean difference of the examples. low, high: bounds of the 95% interval.
      per_seed: mean difference of each seed. first, second: mean of each arm.
    """

    mean: float
    low: float
    high: float
    per_seed: tuple[float, ...]
    first: float
    second: float

    @property
    def is_above_zero(self) -> bool:
        """Whether the whole interval is above 0."""
        return self.low > 0

    @property
    def verdict(self) -> str:
        """Whether the interval excludes 0; a null is called a null."""
        return "higher" if self.low > 0 else "lower" if self.high < 0 else "no difference found"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self) | {"verdict": self.verdict}

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def paired_bootstrap(
    a: Sequence[np.ndarray], b: Sequence[np.ndarray], replicates: int = REPLICATES, seed: int = 0
) -> Difference:
    """The difference a - b with a 95% percentile interval.

    Each replicate draws seeds with replacement and examples with replacement, the same examples for all seeds: a hard
    example is hard for every seed, so seeds are no independent measurements of it (the "pigeonhole bootstrap", Owen
    2007). Where seeds have different numbers of examples, the examples of each drawn seed are drawn on their own. Arms
    are paired: both are evaluated on the same examples, so an example contributes its difference. With one seed, only
    the examples are drawn.

    Args:
      a, b: for each seed, one value per example [N], in the same order for both arms and for all seeds.

    Raises:
      ValueError: no examples, or the arms have other seeds or examples.
    """
    if len(a) != len(b) or any(np.shape(x) != np.shape(y) for x, y in zip(a, b, strict=False)):
        raise ValueError("paired arms need the same seeds and the same examples")
    if not len(a) or not all(map(len, a)):
        raise ValueError("paired arms need at least one seed, and examples for each")
    rng = np.random.default_rng(seed)
    gaps = [np.asarray(x, float) - np.asarray(y, float) for x, y in zip(a, b, strict=True)]
    drawn = rng.integers(len(gaps), size=(replicates, len(gaps)))
    if len({len(gap) for gap in gaps}) == 1:
        of_seeds = _resample(rng, len(gaps[0]), replicates) @ np.transpose(gaps)  # [replicates, seeds]
        means = np.take_along_axis(of_seeds, drawn, axis=1)
    else:
        means = np.zeros(drawn.shape)
        for i, gap in enumerate(gaps):
            means[drawn == i] = _resample(rng, len(gap), (drawn == i).sum()) @ gap
    low, high = np.percentile(means.mean(-1), [2.5, 97.5])
    per_seed = tuple(float(gap.mean()) for gap in gaps)
    first, second = (float(np.mean([np.mean(x) for x in arm])) for arm in (a, b))
    return Difference(float(np.mean(per_seed)), float(low), float(high), per_seed, first, second)


def _resample(rng: np.random.Generator, examples: int, replicates: int) -> np.ndarray:
    """The weights of the examples in each replicate's mean [replicates, examples]."""
    return rng.multinomial(examples, np.full(examples, 1 / examples), size=replicates) / examples
