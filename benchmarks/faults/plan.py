"""Which fault happens when: a function of the seed and the number of the point."""

import dataclasses
import math
import zlib
from collections.abc import Iterable, Sequence

import numpy as np

KINDS = ("SIGKILL", "SIGTERM", "SIGSTOP", "full disk", "missing file", "store errors", "store down")
PROCESSES = {1: 0.5, 2: 0.35, 4: 0.15}  # numbers of processes and how often they are drawn
PHASES = {"start": 0.2, "compile": 0.15, "train": 0.5, "end": 0.15}
STEPS, SAVE_EVERY, EVALUATE_EVERY = 40, 8, 5
PER_RUN = 5  # points of one run
AFTER_STEP = 1.0  # seconds after a step's line within which a fault of the phase "train" happens
FULL = (0, 512, 4096, 65536)  # bytes that a full disk still has


@dataclasses.dataclass(frozen=True)
class Point:
    """One fault.

    Attributes:
      number: place in the plan.
      kind: one of `KINDS`. processes: of the run. place: where its workdir and records are, "disk" or "store".
      phase: "start" is before parameters are counted, "compile" before the first step, "train" after the line of step
        `step`, "end" after the last step's line.
      fraction: of the phase's time in an undisturbed run (of `AFTER_STEP` in "train"), after which the fault happens.
      target: the process that a signal is sent to, -1 for all of them.
      seconds: how long the fault lasts. Signals that end a process last no time.
      kills: whether a stopped process is killed instead of continued.
      again: whether the run is started once more while the fault lasts, if it has ended.
      amount: share of failing requests ("store errors"), or position in the list of files ("missing file") or in `FULL`
        ("full disk"), as a fraction.
    """

    number: int
    kind: str
    processes: int
    place: str
    phase: str
    step: int
    fraction: float
    target: int
    seconds: float
    kills: bool
    again: bool
    amount: float


def draw(seed: int, number: int, processes: Sequence[int]) -> Point:
    """The point of a number. All kinds occur in every len(KINDS) consecutive points.

    Args:
      processes: the numbers of processes to choose from, keys of `PROCESSES`.
    """
    cycle, place = divmod(number, len(KINDS))
    kind = KINDS[np.random.default_rng([seed, cycle]).permutation(len(KINDS))[place]]
    rng = np.random.default_rng([seed, number, zlib.crc32(kind.encode())])
    shares = np.array([PROCESSES[n] for n in processes])
    count = int(rng.choice(processes, p=shares / shares.sum()))
    on_store = kind.startswith("store") or (kind != "full disk" and rng.random() < 0.25)
    long = kind in ("missing file", "store down", "full disk")
    return Point(
        number=number,
        kind=kind,
        processes=count,
        place="store" if on_store else "disk",
        phase=str(rng.choice(list(PHASES), p=list(PHASES.values()))),
        step=int(rng.integers(1, STEPS)),
        fraction=round(float(rng.random()), 3),
        target=int(rng.integers(-1, count)) if count > 1 else 0,
        seconds=round(float(rng.uniform(2, 20 if long else 8)), 1),
        kills=bool(rng.random() < 0.3),
        again=bool(rng.random() < 0.5),
        amount=round(float(rng.random()), 3),
    )


def draw_all(seed: int, points: int, processes: Sequence[int]) -> list[Point]:
    """The first points of a plan."""
    return [draw(seed, number, processes) for number in range(points)]


def in_runs(points: Iterable[Point]) -> list[list[Point]]:
    """Groups of points that one run can have one after the other: the same place and number of processes."""
    groups: list[list[Point]] = []
    open_groups: dict[tuple[str, int], list[Point]] = {}
    for point in points:
        key = point.place, point.processes
        if key not in open_groups or len(open_groups[key]) == PER_RUN:
            open_groups[key] = []
            groups.append(open_groups[key])
        open_groups[key].append(point)
    return groups


def chosen(amount: float, items: Sequence[object]) -> int:
    """The index of an item at a fraction of a list."""
    return min(math.floor(amount * len(items)), len(items) - 1)
