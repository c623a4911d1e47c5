"""Alternated timing of ours and peers in one process: what every benchmark here prints."""

import statistics
import time
from collections.abc import Callable


def compare(
    title: str, ours: Callable[[], None], peers: dict[str, Callable[[], None]], rounds: int = 9
) -> dict[str, float]:
    """Runs ours and each peer in turn, after one warm-up each; prints medians and ratios (above 1: ours is faster).

    Args:
      ours, peers: each does the work once and waits for its end.

    Returns:
      median seconds of "ours" and of each peer.
    """
    cases = {"ours": ours} | peers
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for name, run in cases.items():
        began = time.perf_counter()
        run()
        print(f"{title}: {name} warm-up {time.perf_counter() - began:.1f} s", flush=True)
    for _ in range(rounds):
        for name, run in cases.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, values in seconds.items():
        spread = (max(values) - min(values)) / medians[name]
        ratio = "" if name == "ours" else f"   ours is {medians[name] / medians['ours']:.2f} times as fast"
        print(f"{title}: {name:24} {medians[name] * 1e3:9.1f} ms (spread {spread:.0%}){ratio}", flush=True)
    return medians
