"""Alternated timing of ours and peers in one process: what every benchmark here prints."""

import statistics
import time
from collections.abc import Callable
from typing import Any


def compare(
    title: str, ours: Callable[[], None], peers: dict[str, Callable[[], Any]], rounds: int = 9
) -> dict[str, float]:
    """Runs ours and each peer in turn, after one warm-up each; prints medians and ratios (above 1: ours is faster).

    Args:
      ours, peers: each does the work once and waits for its end; a peer that times itself returns its seconds.

    Returns:
      median seconds of "ours" and of each peer.
    """
    cases: dict[str, Callable[[], Any]] = {"ours": ours} | peers
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for name, run in cases.items():
        began = time.perf_counter()
        run()
        print(f"{title}: {name} warm-up {time.perf_counter() - began:.1f} s", flush=True)
    for _ in range(rounds):
        for name, run in cases.items():
            began = time.perf_counter()
            timed = run()
            seconds[name].append(timed if isinstance(timed, float) else time.perf_counter() - began)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, values in seconds.items():
        spread = (max(values) - min(values)) / medians[name]
        ratio = "" if name == "ours" else f"   ours is {medians[name] / medians['ours']:.2f} times as fast"
        print(f"{title}: {name:24} {medians[name] * 1e3:9.1f} ms (spread {spread:.0%}){ratio}", flush=True)
    return medians
