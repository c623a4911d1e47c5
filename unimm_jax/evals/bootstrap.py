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

    Each replicate draws seeds with replacement and, within each drawn seed, examples with replacement. Arms are paired:
    both are evaluated on the same examples, so an example contributes its difference. With one seed, only the examples
    are drawn.

    Args:
      a, b: for each seed, one value per example [N], in the same order for both arms.

    Raises:
      ValueError: no examples, or the arms have other seeds or examples.
    """
    if len(a) != len(b) or any(np.shape(x) != np.shape(y) for x, y in zip(a, b, strict=False)):
        raise ValueError("paired arms need the same seeds and the same examples")
    if not len(a) or not all(map(len, a)):
        raise ValueError("paired arms need at least one seed, and examples for each")
    rng = np.random.default_rng(seed)
    gaps = [np.asarray(x, float) - np.asarray(y, float) for x, y in zip(a, b, strict=True)]
    drawn_seeds = rng.integers(len(gaps), size=(replicates, len(gaps)))
    means = np.zeros((replicates, len(gaps)))
    for i, gap in enumerate(gaps):  # a new resample of the examples for every time that the seed is drawn
        times = (drawn_seeds == i).sum()
        counts = rng.multinomial(len(gap), np.full(len(gap), 1 / len(gap)), size=times)
        means[drawn_seeds == i] = counts @ gap / len(gap)
    low, high = np.percentile(means.mean(-1), [2.5, 97.5])
    per_seed = tuple(float(gap.mean()) for gap in gaps)
    first, second = (float(np.mean([np.mean(x) for x in arm])) for arm in (a, b))
    return Difference(float(np.mean(per_seed)), float(low), float(high), per_seed, first, second)
