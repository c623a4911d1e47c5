"""One workdir that is trained to its end, through faults."""

import pathlib
import signal
import time
from collections.abc import Callable
from typing import Any

from benchmarks.faults import judge
from benchmarks.faults.places import Places
from benchmarks.faults.plan import AFTER_STEP, FULL, Point, chosen
from benchmarks.faults.stage import Launch, command
from unimm_jax import storage

STARTS = 4  # without a fault in between; a run that has not finished then does not finish
# seconds, beside some times of an undisturbed run, after which a process hangs; Orbax waits for 600 seconds for another
# process whose write has failed
PATIENCE = 900
Row = dict[str, Any]


class Run:
    """A run and the points that it has had.

    Args (constructor):
      places: of the campaign. place, processes: see `plan.Point`. folder: for its logs and caches; made here.
      seconds: from the start to the end of each phase of an undisturbed run, and to its "exit".

    Attributes:
      rows: a row for each point that it has had. `said` has how processes ended, `problems` what must not happen.
    """

    def __init__(self, places: Places, place: str, processes: int, folder: pathlib.Path, seconds: dict[str, float]):
        folder.mkdir(parents=True)
        self.places, self.place, self.processes, self.folder = places, place, processes, folder
        self.workdir = places.workdir(place, folder.name)
        self.line = command(str(self.workdir), str(places.records[place]))
        self.seconds, self.bound = seconds, PATIENCE + 4 * seconds.get("exit", 60.0)
        self.launch: Launch | None = None
        self.starts = 0
        self.kinds: list[str] = []  # of faults since the last start: a write may fail after the fault that it met
        self.rows: list[Row] = [{"said": [], "problems": []}]  # the first is for what happens before any fault

    def start(self, lasting: tuple[str, ...] = ()) -> Launch:
        """Starts the processes, perhaps while faults last."""
        self.starts, self.kinds = self.starts + 1, list(lasting)
        self.launch = Launch(self.line, self.processes, self.folder, self.starts)
        return self.launch

    def advance(self, until: Callable[[Launch], bool]) -> bool:
        """Runs until a condition holds, and starts the processes again when they have ended.

        Returns:
          False if the run finishes first, or if it does not finish.
        """
        for _ in range(STARTS):
            launch = self.launch or self.start()
            while not launch.has_ended():
                if until(launch):
                    return True
                if launch.seconds > self.bound:
                    self._hangs(launch)
                time.sleep(0.02)
            if self.collect():
                return False
        self.rows[-1]["problems"].append(f"has not finished after {STARTS} starts")
        return False

    def _hangs(self, launch: Launch) -> None:
        running = [i for i, p in enumerate(launch.processes) if p.poll() is None]
        self.rows[-1]["problems"].append(f"hangs: process {running} of start {self.starts}")
        launch.end()

    def collect(self) -> bool:
        """Notes how the processes of a start that has ended did so; whether all have finished training."""
        launch, row = self.launch, self.rows[-1]
        self.launch = None
        ends = [
            judge.verdict(process.returncode, launch.said(index), launch.sent[index])
            for index, process in enumerate(launch.processes)
        ]
        row["said"].append({"start": self.starts, "ends": ends})
        row["problems"] += judge.unexpected(ends, self.kinds, self.processes)
        return all(end == "finished" for end in ends)

    # ---- Faults ------------------------------------------------------------------------------------------------------

    def is_time(self, point: Point) -> Callable[[Launch], bool]:
        """A function that says whether the moment of a point has come; the phase's time counts from when it is seen."""
        seen: list[float] = []
        order = list(self.seconds)  # phases, then "exit"

        def now(launch: Launch) -> bool:
            phase, step = launch.phase(), launch.step()
            if (
                not seen
                and (order.index(phase) >= order.index(point.phase))
                and (point.phase != "train" or step >= point.step)
            ):
                seen.append(launch.began if point.phase == "start" else time.monotonic())
            return bool(seen) and time.monotonic() - seen[0] >= point.fraction * self._length(point.phase)

        return now

    def _length(self, phase: str) -> float:
        """Seconds that a phase takes in an undisturbed run."""
        if phase == "train":
            return AFTER_STEP
        ends = list(self.seconds)
        before = self.seconds[ends[ends.index(phase) - 1]] if phase != "start" else 0.0
        return self.seconds[phase] - before

    def meet(self, point: Point, row: Row) -> bool:
        """Waits for the moment of a point and applies it; False if the run ends before."""
        if not self.advance(self.is_time(point)):
            return False
        said = self.launch.said().splitlines()
        row |= {"run": self.folder.name, "at": round(self.launch.seconds, 1), "after": (said or [""])[-1][:90]}
        self.rows.append(row)
        self.kinds.append(point.kind)
        if point.kind.startswith("SIG"):
            self._signal(point, self.launch)
        else:
            self._outage(point, self.launch)
        return True

    def _signal(self, point: Point, launch: Launch) -> None:
        launch.send(signal.Signals[point.kind], point.target)
        if point.kind == "SIGSTOP":
            time.sleep(point.seconds)
            launch.send(signal.SIGKILL if point.kills else signal.SIGCONT, point.target)
            if not point.kills:
                return
        if not launch.wait(self.bound):
            self._hangs(launch)
        self.collect()

    def _outage(self, point: Point, launch: Launch) -> None:
        before = self.places.server.failed()
        end = self._begin(point)
        try:
            launch.wait(point.seconds)
            while point.kind == "store errors" and self.places.server.failed() == before:  # nothing was requested
                if launch.wait(0.2) or launch.seconds > self.bound:
                    break
            if any(p.poll() is not None for p in launch.processes):
                if not launch.wait(self.bound):  # one has ended, so all must
                    self._hangs(launch)
                if not self.collect() and point.again:
                    if self.start((point.kind,)).wait(2 * self.seconds["exit"]):
                        self.collect()
        finally:
            end()

    def _begin(self, point: Point) -> Callable[[], None]:
        """Starts a fault that lasts; the function that ends it."""
        if point.kind == "full disk":
            self.places.disk.fill(FULL[chosen(point.amount, FULL)])
            return self.places.disk.free
        if point.kind == "store errors":
            row, before = self.rows[-1], self.places.server.fail(0.1 + 0.4 * point.amount, point.number)

            def no_errors() -> None:
                row["failed_requests"] = self.places.server.fail(0.0) - before

            return no_errors
        if point.kind == "store down":
            self.places.server.kill()
            return self.places.server.start
        records = self.places.records[self.place]
        names = storage.files_under(records)
        file = records / names[chosen(point.amount, names)]
        self.rows[-1]["file"] = str(file.relative_to(records))
        content = file.read_bytes()
        file.unlink()

        def put_back() -> None:
            file.write_bytes(content)

        return put_back

    # ---- The end -----------------------------------------------------------------------------------------------------

    def finish(self, wanted: dict[str, Any]) -> list[Row]:
        """Trains to the end, without further faults, and compares; the rows of its points, with their results."""
        self.advance(lambda launch: False)
        if self.launch is not None:
            self.launch.end()
        try:
            problems = judge.differences(wanted, judge.left(self.workdir))
        except Exception as error:  # whatever it left is not a finished run
            problems = [f"what it left cannot be read: {type(error).__name__}: {str(error)[:300]}"]
        problems += self.rows[0]["problems"]
        for row in self.rows[1:]:
            row["problems"] += problems
            ends = [end for said in row["said"] for end in said["ends"]]
            row["refused"] = any(end.startswith("refused") for end in ends)
            row["aborted"] = any(end.startswith("aborted") for end in ends)
            row["result"] = "failure" if row["problems"] else "equal"
        return self.rows[1:]

    def measure(self) -> dict[str, Any] | None:
        """Trains without faults: {"seconds": ends of the phases, "left": see `judge.left`}; None if it ended early."""
        seconds = dict.fromkeys(("start", "compile", "train", "end", "exit"), 0.0)

        def note(launch: Launch) -> bool:
            seconds[launch.phase()] = seconds["exit"] = round(launch.seconds, 2)
            return False

        self.advance(note)
        return {"seconds": seconds, "left": judge.left(self.workdir)} if self.starts == 1 else None
