"""Output of a run: console lines with speed and ETA, `metrics.jsonl`, `evals.jsonl`, TensorBoard, profiles."""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from clu import parameter_overview

from unimm_jax import storage
from unimm_jax.evals.base import Result
from unimm_jax.progress import duration
from unimm_jax.sharding import flatten
from unimm_jax.wandb_run import WandbRun

# Logged, but left out of the console line or shown there in another form
_NOT_ON_CONSOLE = {
    "examples_per_step", "loss", "step_ms", "learning_rate", "grad_norm", "goodput", "input_stall",
    "checkpoint_seconds", "checkpoint_blocking",
}  # fmt: skip


class Writer:
    """Writes a stage's metrics.

    Args (constructor):
      workdir: gets `metrics.jsonl`, `evals.jsonl`, TensorBoard events under `tensorboard/` and images under `images/`.
      steps: total, for the ETA. start: step at which this process began.
      active: False on all processes but the first: nothing is written.
      open_wandb: opens a run on Weights & Biases that gets the same values; None for none.

    Attributes:
      folder: where the files are written: the workdir, or a local directory if that is on an object store.
    """

    def __init__(
        self,
        workdir: str | pathlib.Path,
        name: str,
        steps: int,
        start: int,
        active: bool = True,
        open_wandb: Callable[[], WandbRun] | None = None,
    ):
        self.name, self.steps, self.active = name, steps, active
        self._last = (start, time.perf_counter())
        self.folder = storage.path(workdir)
        if active:
            files = ("metrics.jsonl", "evals.jsonl")
            self._spool = storage.Spool(self.folder, files)
            self.folder = self._spool.folder
            for file in files:
                _drop_after(self.folder / file, start)
            self._lines = open(self.folder / "metrics.jsonl", "a", buffering=1)
            self._board = _Board(self.folder / "tensorboard")
            self._wandb = open_wandb() if open_wandb else None

    def scalars(self, step: int, values: dict[str, Any], counts: dict[str, float]) -> dict[str, float]:
        """Logs one step: adds step time and speeds, prints the console line; returns all values.

        Args:
          counts: what a step processes, name → number; logged per second. "mfu" is the time that the step's operations
            take at the chips' peak, in seconds, so that its rate is the utilization.
        """
        then, clock = self._last
        now = time.perf_counter()
        self._last = (step, now)
        seconds = (now - clock) / max(step - then, 1)
        row = {k: float(np.asarray(v)) for k, v in values.items()}
        row["step_ms"] = seconds * 1e3
        for name, amount in counts.items():
            row[name if name == "mfu" else f"{name}_per_second"] = amount / max(seconds, 1e-9)
        if self.active:
            self._lines.write(json.dumps({"step": step} | {k: round(v, 6) for k, v in row.items()}) + "\n")
            self._board.scalars(step, row)
            if self._wandb:
                self._wandb.scalars(step, row)
            left = (self.steps - step) * seconds
            shown = {k: v for k, v in row.items() if k not in _NOT_ON_CONSOLE and not k.endswith("_per_second")}
            rest = "  ".join(f"{k} {v:.3g}" for k, v in shown.items())
            print(
                f"{self.name}  {step:>6}/{self.steps}  loss {row.get('loss', float('nan')):.4f}  {rest}  "
                f"{row['examples_per_second']:.0f}/s  ETA {duration(left)}",
                flush=True,
            )
        return row

    def evaluation(self, step: int, name: str, result: Result) -> None:
        """Logs an evaluation: a line of `evals.jsonl` and of the console, TensorBoard scalars and images."""
        found = result.scalars()
        if not self.active or not found:
            return
        with open(self.folder / "evals.jsonl", "a") as lines:
            lines.write(json.dumps({"step": step, "eval": name} | {k: round(v, 6) for k, v in found.items()}) + "\n")
        named = {f"{name}/{key}": value for key, value in found.items()}
        self._board.scalars(step, named)
        if self._wandb:
            self._wandb.scalars(step, named)
        for key, image in result.images.items():
            self.image(step, f"{name}_{key}", image)
        named = {k.removesuffix("/overall"): v for k, v in found.items() if "/" not in k or k.endswith("/overall")}
        shown = "  ".join(f"{k} {v:.4g}" for k, v in named.items())
        print(f"{self.name}  {step:>6}/{self.steps}  {name}: {shown}", flush=True)

    def count_from(self, step: int) -> None:
        """Starts the measurement of speed at this step, now."""
        self._last = (step, time.perf_counter())

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes what happens inside from the speed."""
        start = time.perf_counter()
        yield
        self._last = (self._last[0], self._last[1] + time.perf_counter() - start)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """An image, uint8 [H, W, 3], to TensorBoard and to `images/<name>.png` (the newest)."""
        if not self.active:
            return
        from PIL import Image

        self._board.image(step, name, image)
        if self._wandb:
            self._wandb.image(step, name, image)
        folder = self.folder / "images"
        folder.mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / f"{name}.png")

    def flush(self) -> None:
        """Copies what was written to the workdir, if that is on an object store."""
        if self.active:
            self._spool.flush()

    def close(self) -> None:
        """Flushes everything."""
        if self.active:
            self._lines.close()
            self._board.close()
            if self._wandb:
                self._wandb.close()
            self._spool.close()


class _Board:
    """TensorBoard events, written by the thread that logs them.

    The thread of `tensorboardX.SummaryWriter` ends when the disk is full; the training loop would then wait for it.
    """

    def __init__(self, folder: pathlib.Path):
        from tensorboardX.event_file_writer import EventsWriter

        folder.mkdir(parents=True, exist_ok=True)
        self._events = EventsWriter(str(folder / "events"))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Writes values by name."""
        from tensorboardX import summary

        for name, value in values.items():
            self._write(step, summary.scalar(name, value))
        self._events.flush()

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes an image, uint8 [H, W, 3]."""
        from tensorboardX import summary

        self._write(step, summary.image(name, image, dataformats="HWC"))
        self._events.flush()

    def _write(self, step: int, content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._events.write_event(Event(wall_time=time.time(), step=step, summary=content))

    def close(self) -> None:
        """Closes the file."""
        self._events.close()


@dataclasses.dataclass(frozen=True)
class _ParameterRow:
    """One line of `parameters.txt`."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    size: int
    sharding: str
    learning_rate: str  # multiplier, or "frozen"


def parameter_table(params: Any, multipliers: dict[str, float]) -> str:
    """All parameters with shape, dtype, partition and learning-rate multiplier; the last line has the totals.

    Args:
      params: nested dict of arrays with shardings, abstract or not. multipliers: path → multiplier of trained ones.
    """
    rows = []
    for path, x in flatten(params):
        partition = str(tuple(x.sharding.spec)) if hasattr(x.sharding, "spec") else ""
        rate = f"{multipliers[path]:g}" if path in multipliers else "frozen"
        rows.append(_ParameterRow(path, tuple(x.shape), str(x.dtype), math.prod(x.shape), partition, rate))
    total, trained = sum(r.size for r in rows), sum(r.size for r in rows if r.learning_rate != "frozen")
    return f"{parameter_overview.make_table(rows)}\n{total:,} parameters, {trained:,} trained"


class WindowMean:
    """Means of metrics over the steps since the last reading, summed on the device."""

    def __init__(self) -> None:
        self._sums: dict[str, jax.Array] = {}
        self._steps = 0

    def save(self) -> dict[str, Any]:
        """The current window, for a checkpoint inside it: float32 sums and the number of steps."""
        return {"sums": {name: float(np.asarray(value)) for name, value in self._sums.items()}, "steps": self._steps}

    def restore(self, saved: dict[str, Any], where: jax.sharding.Sharding) -> None:
        """Continues a window that `save` returned; its sums are placed with the sharding `where`."""
        sums = {name: np.float32(value) for name, value in saved["sums"].items()}
        self._sums, self._steps = jax.device_put(sums, where), saved["steps"]

    def add(self, metrics: dict[str, jax.Array]) -> None:
        """Adds the metrics of a step, without waiting for them."""
        self._sums = _add(self._sums, metrics) if self._steps else metrics
        self._steps += 1

    def read(self) -> dict[str, float]:
        """The means; starts a new window."""
        found = {name: float(np.asarray(value)) / self._steps for name, value in self._sums.items()}
        self._sums, self._steps = {}, 0
        return found


@jax.jit
def _add(sums: dict[str, jax.Array], metrics: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return jax.tree.map(lambda a, b: a.astype(jnp.float32) + b.astype(jnp.float32), sums, metrics)


class Profiler:
    """Traces a number of steps with `jax.profiler`, for TensorBoard or Perfetto.

    Args (constructor):
      folder: gets the trace. start: first step of this process.
      after: steps to wait from `start` on (compilation is not worth tracing). steps: number of steps; 0 is none.
    """

    def __init__(self, folder: pathlib.Path, start: int, after: int, steps: int):
        self.folder, self.first, self.steps = folder, start + after, steps
        self._tracing = False

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Surrounds a training step."""
        if self.steps and step == self.first:
            jax.profiler.start_trace(str(self.folder))
            self._tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield
        if self._tracing and step + 1 >= self.first + self.steps:
            self.close()

    def close(self) -> None:
        """Writes the trace if one is open."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
            print(f"profile: {self.folder} (tensorboard --logdir={self.folder}, or ui.perfetto.dev)", flush=True)


class Clock:
    """Where a loop's time goes: seconds spent on named things other than steps.

    Attributes:
      whole: what → seconds in this process. before: those of earlier processes of the run.
      prepared: seconds before the loop, which `goodput` leaves out.
    """

    def __init__(self) -> None:
        self.began = self._read = time.perf_counter()
        self.whole: dict[str, float] = {}
        self.before: dict[str, float] = {}
        self.prepared = 0.0
        self._since: dict[str, float] = {}

    @contextlib.contextmanager
    def on(self, what: str, counts: Callable[[], bool] = lambda: True) -> Iterator[None]:
        """Counts the time inside as spent on `what`, unless `counts`, called at its end, returns False."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if counts():
                spent = time.perf_counter() - start
                self.whole[what] = self.whole.get(what, 0.0) + spent
                self._since[what] = self._since.get(what, 0.0) + spent

    def totals(self) -> dict[str, float]:
        """Seconds by what they were spent on, those before the loop and those of earlier processes included."""
        now = self.whole | {"prepare": self.whole.get("prepare", 0.0) + self.prepared}
        return {name: round(self.before.get(name, 0.0) + now.get(name, 0.0), 2) for name in self.before | now}

    def read(self) -> dict[str, float]:
        """`input_stall`: share of the time since the last call in which devices were idle because the next batch was
        not ready (a wait at whose end they are idle counts whole). `goodput`: share of the time since the start that
        was not spent on waiting, saving, evaluating, drawing or compiling."""
        now = time.perf_counter()
        stall = self._since.get("input", 0.0) / max(now - self._read, 1e-9)
        good = 1 - sum(self.whole.values()) / max(now - self.began, 1e-9)
        self._read, self._since = now, {}
        return {"input_stall": stall, "goodput": good}


def _drop_after(file: pathlib.Path, step: int) -> None:
    """Cuts off the lines that an interrupted run wrote after the step from which the run resumes.

    A line that a kill cut off ends the file, too. The file is shortened in place, so that a kill or a full disk at this
    moment loses no line.
    """
    if not file.exists():
        return
    kept = 0
    with file.open("rb") as lines:
        for line in lines:
            try:
                if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                    break
            except ValueError:
                break
            kept += len(line)
    os.truncate(file, kept)


def read(workdir: str | pathlib.Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The rows of a workdir's `metrics.jsonl` or `evals.jsonl`."""
    file = storage.path(workdir) / name
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
