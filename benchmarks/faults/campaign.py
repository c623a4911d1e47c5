"""Runs a plan of faults and keeps the results."""

import dataclasses
import json
import pathlib
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from benchmarks.claims.experiment import table
from benchmarks.faults.places import Places
from benchmarks.faults.plan import KINDS, PHASES, Point, draw_all, in_runs
from benchmarks.faults.run import Row, Run

TRIES = 3  # runs in which the moment of a point may come too late


class Campaign:
    """A plan, and the results of the points that have been run. An interrupted campaign continues.

    Args (constructor):
      output: directory of the campaign. seed, points, processes: of the plan. only: numbers of the points to run,
        all if None.
    """

    def __init__(
        self, output: pathlib.Path, seed: int, points: int, processes: Sequence[int], only: Sequence[int] | None = None
    ):
        plan = draw_all(seed, points, processes)
        self.output, self.plan = output, [p for p in plan if only is None or p.number in only]
        self.file = output / "points.jsonl"
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.results: dict[int, Row] = {row["number"]: row for row in map(json.loads, lines)}
        self.whole: dict[int, dict[str, Any]] = {}
        self.runs = len(list((output / "runs").glob("run*")))
        self._newest: Run | None = None
        self._began, self._before = time.monotonic(), len(self.results)

    def run(self) -> Counter[str]:
        """Runs all points that have no result and writes `results.md`; how many points have each result."""
        self.places = Places(self.output)
        run: Run | None = None
        try:
            for count in sorted({point.processes for point in self.plan}):
                self._measure(count)
            for group in in_runs(p for p in self.plan if p.number not in self.results):
                for point in group:
                    if point.kind == "full disk" and self.places.disk.refusal:
                        self._record(dataclasses.asdict(point) | {"result": "skipped", "problems": []})
                    else:
                        run = self._meet(point, run)
                run = self._finish(run)
        finally:
            if self._newest is not None and self._newest.launch is not None:
                self._newest.launch.end()
            self.places.close()
        self.write_report()
        return Counter(row["result"] for row in self.results.values())

    def _new_run(self, place: str, processes: int) -> Run:
        self.runs += 1
        folder = self.output / "runs" / f"run{self.runs:03d}"
        seconds = self.whole.get(processes, {}).get("seconds", {})
        self._newest = Run(self.places, place, processes, folder, seconds)
        return self._newest

    def _measure(self, processes: int) -> None:
        """Trains once without faults, unless an earlier campaign has.

        Raises:
          SystemExit: it ends early `TRIES` times.
        """
        file = self.output / f"undisturbed{processes}.json"
        for _ in range(TRIES):
            if file.exists():
                break
            run = self._new_run("disk", processes)
            if (found := run.measure()) is not None:
                file.write_text(json.dumps(found))
            shutil.rmtree(run.workdir)
        else:
            raise SystemExit(f"undisturbed runs of {processes} processes fail; see {run.folder}")
        self.whole[processes] = json.loads(file.read_text())
        print(f"undisturbed, {processes} processes: {self.whole[processes]['seconds']['exit']:.0f} s", flush=True)

    def same_bits(self) -> dict[int, bool]:
        """Whether the undisturbed run of a number of processes has the state, metrics and scores of the first."""
        first, parts = next(iter(self.whole.values()))["left"], ("state", "metrics", "evals")
        return {count: all(whole["left"][p] == first[p] for p in parts) for count, whole in self.whole.items()}

    def _meet(self, point: Point, run: Run | None) -> Run | None:
        """Applies a point to a run, or to a new one if that run ends before; the run."""
        row = dataclasses.asdict(point) | {"said": [], "problems": []}
        for _ in range(TRIES):
            run = run or self._new_run(point.place, point.processes)
            if run.meet(point, row):
                return run
            run = self._finish(run)
        self._record(row | {"result": "not met"})
        return None

    def _finish(self, run: Run | None) -> None:
        """Ends a run and records its points; failing runs keep their workdirs if those are on the disk."""
        if run is None:
            return
        rows = run.finish(self.whole[run.processes]["left"])
        for row in rows:
            self._record(row)
        failed = any(row["problems"] for row in rows) or run.rows[0]["problems"]
        if run.place == "disk":
            if failed:
                shutil.copytree(run.workdir, run.folder / "workdir", dirs_exist_ok=True)
            shutil.rmtree(run.workdir, ignore_errors=True)
        for name in ("tmp", "copies"):
            shutil.rmtree(run.folder / name, ignore_errors=True)
        if failed and not rows:
            print(f"{run.folder.name} failed before any fault: {run.rows[0]['problems']}", flush=True)
        self.write_report()

    def _record(self, row: Row) -> None:
        self.results[row["number"]] = row
        with self.file.open("a") as lines:
            lines.write(json.dumps(row) + "\n")
        done, spent = len(self.results) - self._before, time.monotonic() - self._began
        left = spent / done * (len(self.plan) - len(self.results)) / 60
        what = f"{row['kind']}, {row['processes']} processes, {row['place']}, {row['phase']}"
        told = f"{row['result']} {'; '.join(row['problems'])[:300]}"
        print(
            f"{len(self.results)}/{len(self.plan)}  point {row['number']}: {what}: {told}  ETA {left:.0f} min",
            flush=True,
        )

    # ---- Report ------------------------------------------------------------------------------------------------------

    def write_report(self) -> None:
        """Writes `results.md`."""
        rows = [self.results[p.number] for p in self.plan if p.number in self.results]
        text = f"# Faults during training\n\n{len(rows)} of {len(self.plan)} points.\n\n"
        text += summary(rows) + "\n\n" + by_phase(rows) + "\n"
        if len(self.whole) > 1:
            same = ", ".join(f"{count}: {'yes' if same else 'no'}" for count, same in self.same_bits().items())
            text += f"\nThe undisturbed run ends in the same bits as that of the first number of processes: {same}.\n"
        if failed := [row["failed_requests"] for row in rows if "failed_requests" in row]:
            text += f"\nStore errors: {sum(failed)} requests failed, at least one in {sum(map(bool, failed))} of "
            text += f"{len(failed)} points.\n"
        if any(row["result"] == "skipped" for row in rows):
            text += f"\nSkipped: a full disk needs a file system of its own ({self.places.disk.refusal}).\n"
        for row in rows:
            if row["result"] in ("failure", "not met"):
                what = f"{row['kind']}, {row['processes']} processes, {row['place']}, {row['phase']}"
                text += f"\n- Point {row['number']} ({what}): {row['result']}. {'; '.join(row['problems'])} "
                text += f"Logs: `runs/{row.get('run')}`\n"
        (self.output / "results.md").write_text(text)


def counts(rows: Sequence[Row]) -> list[int]:
    """The numbers of `COLUMNS`."""
    found = Counter(row["result"] for row in rows)
    after = [sum(row["result"] == "equal" and row[how] for row in rows) for how in ("refused", "aborted")]
    return [len(rows), found["equal"], *after, found["failure"], found["skipped"] + found["not met"]]


COLUMNS = ("points", "equal", "… after a line of error", "… after an abort by JAX", "failures", "skipped or not met")


def summary(rows: Sequence[Row]) -> str:
    """A table of kinds and numbers of processes."""
    lines = []
    for kind in KINDS:
        for processes in sorted({row["processes"] for row in rows}):
            if mine := [row for row in rows if (row["kind"], row["processes"]) == (kind, processes)]:
                lines.append([kind, processes, *counts(mine)])
    return table(("fault", "processes", *COLUMNS), [*lines, ["all", "", *counts(rows)]])


def by_phase(rows: Sequence[Row]) -> str:
    """A table of phases."""
    lines = [[phase, *counts([row for row in rows if row["phase"] == phase])] for phase in PHASES]
    return table(("moment", *COLUMNS), lines)
