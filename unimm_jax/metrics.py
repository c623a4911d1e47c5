"""What a run says: console lines with speed and ETA, `metrics.jsonl`, TensorBoard scalars and pictures."""

import contextlib
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np


class Writer:
    """Writes a stage's metrics.

    Args (constructor):
      workdir: gets `metrics.jsonl`, TensorBoard events under `tensorboard/` and pictures under `pictures/`.
      steps: total, for the ETA. start: step at which this process began.
      active: False on all processes but the first: nothing is written.
    """

    def __init__(self, workdir: str | pathlib.Path, name: str, steps: int, start: int, active: bool = True):
        self.name, self.steps, self.active = name, steps, active
        self.workdir = pathlib.Path(workdir)
        self._last = (start, time.perf_counter())
        self._interactive = sys.stdout.isatty()
        if active:
            import tensorboardX

            _drop_after(self.workdir / "metrics.jsonl", start)
            self._lines = open(self.workdir / "metrics.jsonl", "a", buffering=1)
            self._board = tensorboardX.SummaryWriter(str(self.workdir / "tensorboard"))

    def scalars(self, step: int, values: dict[str, Any], amounts: dict[str, float]) -> dict[str, float]:
        """Logs one step: adds step time and speeds, prints the console line; returns all values.

        Args:
          amounts: what a step works through, name → number; logged a second. "mfu" is the step's operations over the
            chips' peak a second, so that its speed is the utilisation.
        """
        then, clock = self._last
        now = time.perf_counter()
        self._last = (step, now)
        seconds = (now - clock) / max(step - then, 1)
        row = {k: float(np.asarray(v)) for k, v in values.items()}
        row["step_ms"] = seconds * 1e3
        for name, amount in amounts.items():
            row[name if name == "mfu" else f"{name}_per_second"] = amount / max(seconds, 1e-9)
        if self.active:
            self._lines.write(json.dumps({"step": step} | {k: round(v, 6) for k, v in row.items()}) + "\n")
            for key, value in row.items():
                self._board.add_scalar(key, value, step)
            left = (self.steps - step) * seconds
            hidden = (
                "loss",
                "step_ms",
                "learning_rate",
                "grad_norm",
                "goodput",
                "input_stall",
                "checkpoint_seconds",
                "checkpoint_blocking",
            )
            shown = {k: v for k, v in row.items() if k not in hidden and not k.endswith("_per_second")}
            rest = "  ".join(f"{k} {v:.3g}" for k, v in shown.items())
            print(
                f"{self.name}  {step:>6}/{self.steps}  loss {row.get('loss', float('nan')):.4f}  {rest}  "
                f"{row['examples_per_second']:.0f}/s  ETA {int(left // 60)}:{int(left % 60):02d}",
                flush=True,
            )
        return row

    def count_from(self, step: int) -> None:
        """Speeds count from this step, now, on."""
        self._last = (step, time.perf_counter())

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out of the speed what happens inside."""
        start = time.perf_counter()
        yield
        self._last = (self._last[0], self._last[1] + time.perf_counter() - start)

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """A picture, uint8 [H, W, 3], to TensorBoard and to `pictures/<name>.png` (the newest)."""
        if not self.active:
            return
        from PIL import Image

        self._board.add_image(name, image, step, dataformats="HWC")
        folder = self.workdir / "pictures"
        folder.mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / f"{name}.png")

    def close(self) -> None:
        """Flushes everything."""
        if self.active:
            self._lines.close()
            self._board.close()


class Clock:
    """Where a loop's time goes: seconds spent on named things other than steps."""

    def __init__(self) -> None:
        self.began = self._read = time.perf_counter()
        self.whole: dict[str, float] = {}
        self._since: dict[str, float] = {}

    @contextlib.contextmanager
    def on(self, what: str, counts: Callable[[], bool] = lambda: True) -> Iterator[None]:
        """Counts what happens inside as time spent on `what`, unless `counts`, asked at its end, says no."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if counts():
                spent = time.perf_counter() - start
                self.whole[what] = self.whole.get(what, 0.0) + spent
                self._since[what] = self._since.get(what, 0.0) + spent

    def read(self) -> dict[str, float]:
        """`input_stall`: share of the time since the last reading in which devices had no work because the next batch
        was not there (a wait at whose end they had none counts whole). `goodput`: share of the time since the start
        that was neither waiting, saving, drawing nor compiling."""
        now = time.perf_counter()
        stall = self._since.get("input", 0.0) / max(now - self._read, 1e-9)
        good = 1 - sum(self.whole.values()) / max(now - self.began, 1e-9)
        self._read, self._since = now, {}
        return {"input_stall": stall, "goodput": good}


def _drop_after(file: pathlib.Path, step: int) -> None:
    """Cuts lines that an interrupted run wrote past the step from which it now goes on."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except ValueError:  # a line cut off by a kill
            continue
    file.write_text("".join(line + "\n" for line in kept))


def read(workdir: str | pathlib.Path) -> list[dict[str, float]]:
    """The rows of a workdir's `metrics.jsonl`."""
    file = pathlib.Path(workdir) / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def grid(images: list[np.ndarray], columns: int, scale: int = 2, gap: int = 2) -> np.ndarray:
    """Lays uint8 pictures of one size in rows on white: uint8 [H, W, 3], each enlarged by `scale`."""
    h, w = (n * scale for n in images[0].shape[:2])
    rows = -(-len(images) // columns)
    sheet = np.full((rows * (h + gap) + gap, columns * (w + gap) + gap, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = gap + i // columns * (h + gap), gap + i % columns * (w + gap)
        sheet[top : top + h, left : left + w] = image.repeat(scale, 0).repeat(scale, 1)
    return sheet


def kept_patches(image: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """The picture with dropped patches faded to white and a dark edge round the kept ones.

    Args:
      image: uint8 [S, S, 3]; keep: boolean [P].
    """
    side = round(len(keep) ** 0.5)
    size = image.shape[0] // side
    big = keep.reshape(side, side).repeat(size, 0).repeat(size, 1)
    shown = np.where(big[..., None], image, 255 - (255 - image.astype(int)) // 5).astype(np.uint8)
    for p in np.flatnonzero(keep):
        y, x = p // side * size, p % side * size
        shown[[y, y + size - 1], x : x + size] = (30, 30, 30)
        shown[y : y + size, [x, x + size - 1]] = (30, 30, 30)
    return shown


def labelled(images: list[np.ndarray], labels: list[str], columns: int, scale: int = 2) -> np.ndarray:
    """Pictures of one size in rows, each with its label (two lines at most) below: uint8 [H, W, 3]."""
    from PIL import Image, ImageDraw, ImageFont

    side, strip, gap = images[0].shape[0] * scale, 28, 6
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (side + gap) + gap, rows * (side + strip + gap) + gap), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        left, top = gap + i % columns * (side + gap), gap + i // columns * (side + strip + gap)
        sheet.paste(Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST), (left, top))
        lines, words = [""], label.split()
        for word in words:
            longer = f"{lines[-1]} {word}".strip()
            if draw.textlength(longer, font) > side and lines[-1]:
                lines.append(word)
            else:
                lines[-1] = longer
        for k, line in enumerate(lines[:2]):
            draw.text((left, top + side + 1 + 12 * k), line, "black", font)
    return np.asarray(sheet)
