"""Steps that a curve takes to a threshold."""

from collections.abc import Sequence


def steps_to(threshold: float, steps: Sequence[float], values: Sequence[float]) -> float:
    """The step at which a curve first reaches a threshold, by linear interpolation; infinite if it never does.

    If the first point has already reached it, its step is returned, which is an upper bound.
    """
    for i, value in enumerate(values):
        if value >= threshold:
            if i == 0:
                return float(steps[0])
            share = (threshold - values[i - 1]) / (value - values[i - 1])
            return float(steps[i - 1] + share * (steps[i] - steps[i - 1]))
    return float("inf")
