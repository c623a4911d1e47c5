"""A long run of one process: do its memory, open files or threads grow?

python -m benchmarks.soak --minutes=120 --output=runs/soak

A tiny stage 2 is trained from random records. It reads images in threads, saves every 400 steps and evaluates every 200
(each every few seconds). Memory, open files and threads of the process and its children are sampled every few seconds.
Memory is resident and anonymous; the kernel may drop pages of mapped files at any time. The last half of the run is cut
into blocks of equal length, and a line is fitted to their means. A quantity grows if its growth per hour exceeds its
bound by more than two standard errors; then the command fails. A short run does not decide, because the errors are
large; from `DECIDES` minutes on, a quantity that is not decided is a failure, too. OUTPUT/results.md has the table,
OUTPUT/*.svg the plots, OUTPUT/samples.jsonl the samples; all are there after a run that ended early, too.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import time
from collections.abc import Sequence

import numpy as np

from benchmarks.claims import experiment, plots
from benchmarks.faults.records import write_records
from benchmarks.faults.stage import Launch, command

GROWS, UNDECIDED = "grows", "not decided: train longer"
EVERY = 5.0  # seconds between samples
BLOCKS = 8  # of the last half
DECIDES = 60.0  # minutes
# name → (unit, bound of the growth per hour)
BOUNDS = {"memory": ("MiB", 16.0), "files": ("open files", 1.0), "threads": ("threads", 1.0)}


@dataclasses.dataclass(frozen=True)
class Growth:
    """Growth of a quantity per hour, its standard error, and the mean of the last half."""

    mean: float
    per_hour: float
    error: float

    def verdict(self, bound: float) -> str:
        """Whether the growth, with a margin of two standard errors, is above or below the bound."""
        if self.per_hour - 2 * self.error > bound:
            return GROWS
        return "no growth" if self.per_hour + 2 * self.error < bound else UNDECIDED


def growth(hours: Sequence[float], values: Sequence[float]) -> Growth:
    """Fits a line to the means of `BLOCKS` blocks of the last half of a series.

    Args:
      hours, values: of each sample; at least 2 · `BLOCKS` samples in the last half.
    """
    half = len(hours) // 2
    x, y = (np.array([b.mean() for b in np.array_split(np.asarray(v)[half:], BLOCKS)]) for v in (hours, values))
    slope, level = np.polyfit(x, y, 1)
    spread = ((y - slope * x - level) ** 2).sum() / (BLOCKS - 2)
    return Growth(float(y.mean()), float(slope), float(np.sqrt(spread / ((x - x.mean()) ** 2).sum())))


def tree(pid: int) -> list[int]:
    """A process and all its descendants."""
    found = [pid]
    for task in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
        found += [other for child in task.read_text().split() for other in tree(int(child))]
    return found


def sample(pid: int) -> dict[str, float]:
    """Memory in MiB, open files and threads of a process and its descendants.

    Raises:
      OSError: the process has ended.
    """
    for _ in range(4):
        with contextlib.suppress(OSError, KeyError):  # a descendant ended meanwhile
            return _sample(pid)
    return _sample(pid)


def _sample(pid: int) -> dict[str, float]:
    found = {"memory": 0.0, "files": 0.0, "threads": 0.0}
    for each in tree(pid):
        status = dict(line.split(":", 1) for line in pathlib.Path(f"/proc/{each}/status").read_text().splitlines())
        found["memory"] += int(status.get("RssAnon", "0").split()[0]) / 1024  # a process that just ended has none
        found["threads"] += int(status["Threads"])
        found["files"] += len(os.listdir(f"/proc/{each}/fd"))
    return found


def train(output: pathlib.Path, minutes: float, samples: list[dict[str, float]]) -> None:
    """Trains for so long, stops with SIGTERM, and appends the samples.

    Raises:
      SystemExit: training ends before, or does not stop.
    """
    records, folder = output / "records", output / "run"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if not (records / "test" / "header.json").exists():
        write_records(records, 320, 4)
        write_records(records / "test", 32)
    line = command(
        str(folder / "stage2"), str(records), "stage2", init_from=(), train__steps=10_000_000, train__log_every=20,
        train__checkpoint_every=400, evals__held_out__every=200, optimizer__schedule="constant",
    )  # fmt: skip
    launch = Launch(line, 1, folder, 1)
    try:
        while launch.seconds < 60 * minutes and not launch.has_ended():
            time.sleep(EVERY)
            if launch.has_ended():
                break
            found = {"hours": launch.seconds / 3600, "step": launch.step()} | sample(launch.processes[0].pid)
            samples.append(found)
            with (output / "samples.jsonl").open("a") as lines:
                lines.write(json.dumps(found) + "\n")
            if len(samples) % 12 == 0:
                shown = "  ".join(f"{name} {found[name]:.0f}" for name in ("step", *BOUNDS))
                print(f"{found['hours'] * 60:.0f} of {minutes:g} min  {shown}", flush=True)
        launch.send(signal.SIGTERM)
        if not launch.wait(120) or launch.processes[0].returncode != 143:
            raise SystemExit(f"training did not stop at SIGTERM with status 143; see {launch.logs[0]}")
    finally:
        launch.end()


def report(output: pathlib.Path, samples: list[dict[str, float]]) -> list[str]:
    """Writes the table and the plots; the quantities that grow and, in a long run, those that are not decided."""
    hours = [row["hours"] for row in samples]
    found = {name: growth(hours, [row[name] for row in samples]) for name in BOUNDS}
    rows, pictures = [], {}
    for name, (unit, bound) in BOUNDS.items():
        mine, title = found[name], f"{name} ({unit})"
        growing = f"{mine.per_hour:+.2f} ± {mine.error:.2f}"
        rows.append((title, f"{mine.mean:.1f}", growing, f"{bound:g}", mine.verdict(bound)))
        curve = [round(60 * h, 1) for h in hours], [[row[name] for row in samples]]
        pictures[name] = plots.curves(title, "minutes", {name: curve})
    head = ("quantity", "mean of the last half", "growth per hour ± standard error", "bound", "verdict")
    heading = f"{60 * hours[-1]:.0f} minutes, {samples[-1]['step']:.0f} steps"
    numbers = {name: dataclasses.asdict(value) for name, value in found.items()}
    experiment.write(output, "Soak", {heading: experiment.table(head, rows)}, numbers, pictures)
    verdicts = {name: found[name].verdict(bound) for name, (_, bound) in BOUNDS.items()}
    passing = {"no growth"} if 60 * hours[-1] >= DECIDES else {"no growth", UNDECIDED}
    return [f"{name}: {verdict}" for name, verdict in verdicts.items() if verdict not in passing]


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--output", type=experiment.local_path, default=pathlib.Path("runs/soak"))
    flags = parser.parse_args()
    output = flags.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    (output / "samples.jsonl").unlink(missing_ok=True)
    samples: list[dict[str, float]] = []
    bad: list[str] = []
    try:
        train(output, flags.minutes, samples)
    finally:
        if len(samples) >= 4 * BLOCKS:
            bad = report(output, samples)
    if len(samples) < 4 * BLOCKS:
        raise SystemExit(f"{len(samples)} samples are too few; train for more --minutes")
    if bad:
        raise SystemExit(f"{'; '.join(bad)}; see {output / 'results.md'}")


if __name__ == "__main__":
    main()
