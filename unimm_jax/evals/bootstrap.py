"""Confidence intervals of differences between two models or methods on the same items."""

from collections.abc import Sequence

import numpy as np


def paired_difference(
    a: Sequence[float] | np.ndarray,
    b: Sequence[float] | np.ndarray,
    resamples: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> tuple[float, float, float]:
    """Mean of a − b and its percentile interval by a paired bootstrap over the items.

    Args:
      a, b: scores of the same items in the same order. resamples: of the items, with replacement.
      seed: of the resamples. confidence: share of the resamples inside of the interval.

    Returns:
      (difference, low, high).

    Raises:
      ValueError: no items, or not as many in `a` as in `b`.
    """
    if len(a) != len(b) or not len(a):
        raise ValueError(f"a paired difference needs the same items twice, not {len(a)} and {len(b)} scores")
    differences = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    rng = np.random.default_rng(seed)
    means = np.array(
        [differences[rng.integers(len(differences), size=len(differences))].mean() for _ in range(resamples)]
    )
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(differences.mean()), float(low), float(high)
