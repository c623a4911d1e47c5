"""The run card: what a run was made of, and exact records of its first steps. `unimm_jax.replay` compares with it.

`runcard.json` in the workdir has these entries:

- `run`, `seed`, `config` (setting → value) and `config_digest`
- `sessions`: one per start of the run: time, first step, `environment` (versions, commit, devices, mesh), and the
  settings that differ from `config`
- `weights`: the checkpoints of `config.init_from`, with digests
- `data`: header of the data, with the fingerprints of its sources
- `steps`: of the first `STEPS` steps, the digests of the batch and the metrics as hexadecimal floats
- `evaluations`: options and sampling settings of the evaluations that ran
- `curve`: quantiles of the logged loss per twentieth of the run
"""

import datetime
import hashlib
import importlib.metadata
import json
import logging
import os
import pathlib
import platform
import re
import subprocess
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from unimm_jax import __version__, checkpoint, distributed, storage
from unimm_jax.config import Config
from unimm_jax.data import digests
from unimm_jax.data.pipeline import Batch, Input
from unimm_jax.data.sources.base import fingerprint_files
from unimm_jax.errors import CheckpointError, DataError

FILE = "runcard.json"
FORMAT = 1
STEPS = 20  # steps whose batches and metrics are recorded
BANDS = 20  # parts of the run for the curve of the loss
PACKAGES = (
    "jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "scipy", "ml-dtypes",
    "tokenizers", "sentencepiece", "pillow", "simplejpeg", "tensorstore", "array-record", "pyarrow", "msgpack",
    "tensorflow-datasets", "safetensors", "scikit-image", "jax-cuda12-plugin", "jax-cuda12-pjrt", "jax-cuda13-plugin",
    "jax-cuda13-pjrt", "etils", "fsspec", "gcsfs", "s3fs", "ml-collections", "clu", "absl-py", "tensorboardX", "wandb",
    "nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "nvidia-cublas-cu12", "nvidia-cublas",
)  # fmt: skip
VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_DEFAULT_MATMUL_PRECISION", "JAX_ENABLE_X64", "NVIDIA_TF32_OVERRIDE")
WIDTH = 118  # of a line of the file; entries that are longer get a line for each of their parts


class RunCard:
    """Writes the run card of a workdir. All processes call its methods at the same steps; the first one writes.

    A run that starts at step 0 gets a new card, a resumed one continues its own: the records of steps after `start` are
    replaced, because the run repeats these steps.

    Args (constructor):
      config: of the run, with the path of its records as it is read.
      data: the input that the run reads.
      start: first step of this process. is_done: whether the run ended there; its card stays as it is, unless
        `config.train.steps` is larger now.
    """

    def __init__(
        self, workdir: pathlib.Path, config: Config, mesh: jax.sharding.Mesh, data: Input, start: int, is_done: bool
    ):
        self._file, self._config, self._data = workdir / FILE, config, data
        self._pending: list[tuple[int, np.ndarray, list[digests.RowDigests], dict[str, jax.Array]]] = []
        self._card: dict[str, Any] = {}
        if jax.process_index() == 0 and (start < config.train.steps or not is_done):
            self._card = self._opened(workdir, mesh, start)
            self._save()

    def _opened(self, workdir: pathlib.Path, mesh: jax.sharding.Mesh, start: int) -> dict[str, Any]:
        settings = flat(self._config)
        card = _earlier(self._file) if start else None
        if card is None:
            header = {name: value for name, value in self._data.header.items() if name != "text_tokenizer"}
            if self._data.text_tokenizer is not None:
                header["text_tokenizer"] = self._data.text_tokenizer.fingerprint
            card = {"format": FORMAT, "run": self._config.name, "seed": self._config.seed, "sessions": []}
            card |= {"weights": [] if start else weights(self._config, workdir), "data": header}
            card |= {"steps": [], "evaluations": {}, "curve": []}
            card |= {"config_digest": _digest(settings), "config": settings}
        changed = {k: v for k, v in settings.items() if k not in card["config"] or card["config"][k] != v}
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        session = {"started": now, "start": start, "config_digest": _digest(settings)}
        card["sessions"].append(session | {"changed": changed, "environment": environment(mesh)})
        card["steps"] = [step for step in card["steps"] if step["step"] <= start]
        return card

    def add(self, step: int, batch: Batch, rows: np.ndarray, metrics: dict[str, jax.Array]) -> None:
        """Records one of the first `STEPS` steps. Does not wait for its metrics.

        Args:
          step: number of the step, from 1.
          batch: the rows of this process. rows: their indices in the global batch.
          metrics: what the step returned, with its loss.
        """
        self._pending.append((step, rows, digests.of_rows(self._data, batch), metrics))

    def write(self) -> None:
        """Writes the steps that were added since the last call, and waits for their metrics."""
        if not self._pending:
            return
        mine = [(step, rows.tolist(), [(row.arrays, row.examples) for row in found])
                for step, rows, found, _ in self._pending]  # fmt: skip
        gathered = [json.loads(part) for part in distributed.gather(json.dumps(mine).encode())]
        if self._card:
            for i, (step, _, _, metrics) in enumerate(self._pending):
                by_row = {row: digests.RowDigests(*found) for part in gathered for row, found in zip(*part[i][1:])}
                values = {name: float(np.asarray(value)) for name, value in metrics.items()}
                record: dict[str, Any] = {"step": step, "loss": round(values["loss"], 6)}
                record["metrics"] = {name: value.hex() for name, value in values.items()}
                self._card["steps"].append(record | digests.of_batch(by_row[row] for row in sorted(by_row)))
            self._save()
        self._pending = []

    def evaluated(self, name: str, options: dict[str, Any], settings: dict[str, Any]) -> None:
        """Notes that an evaluation ran.

        Args:
          options: its entry in `config.evals`. settings: see `evals.base.Result`.
        """
        if self._card and self._card["evaluations"].get(name) != (noted := options | settings):
            self._card["evaluations"][name] = noted
            self._save()

    def finish(self, rows: Iterable[dict[str, Any]]) -> None:
        """Writes what is left, with the curve of the loss.

        Args:
          rows: the logged metrics of the whole run.
        """
        self.write()
        if self._card:
            self._card["curve"] = bands(rows, self._config.train.steps)
            self._save()

    def _save(self) -> None:
        storage.write_whole(self._file, (_text(self._card) + "\n").encode())


def read(workdir: pathlib.Path) -> dict[str, Any]:
    """The run card of a workdir.

    Raises:
      DataError: there is none, or it is damaged or of a newer version.
    """
    file = workdir / FILE
    if not storage.kind(file):
        raise DataError(f"{workdir} has no {FILE}; give the workdir of a run of this version of unimm_jax")
    try:
        card = json.loads(storage.read(file))
        written = card["format"]
        found = {name: card[name] for name in ("sessions", "config", "weights", "data", "steps")}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is damaged ({error}); train again to get a new one") from None
    if written > FORMAT:
        raise DataError(f"{file} has format {written}, this version reads up to {FORMAT}; update unimm_jax")
    return found


def _earlier(file: pathlib.Path) -> dict[str, Any] | None:
    """The card of the earlier sessions; None if there is none that this version can continue."""
    if not storage.kind(file):
        return None
    try:
        card = json.loads(storage.read(file))
        if card["format"] == FORMAT:
            return dict(card)
    except (ValueError, KeyError, TypeError):
        pass
    logging.warning("%s cannot be read; a new one without the earlier sessions replaces it", file)
    return None


def flat(config: Config) -> dict[str, Any]:
    """Setting → value as JSON has it, with dotted names such as "train.steps"."""
    found = {}

    def walk(value: Any, name: str) -> None:
        if isinstance(value, dict) and value:
            for key, item in value.items():
                walk(item, f"{name}.{key}" if name else key)
        else:
            found[name] = value

    walk(json.loads(json.dumps(config.as_dict())), "")
    return found


def environment(mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """What may change the bits of a result beside config and data: name → value. What is not there is left out."""
    found: dict[str, Any] = {"unimm_jax": __version__, "commit": commit(), "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    devices = jax.devices()
    found |= {"platform": devices[0].platform, "device kind": devices[0].device_kind, "devices": len(devices)}
    found |= {"processes": jax.process_count(), "mesh": " × ".join(f"{n} {size}" for n, size in mesh.shape.items())}
    found |= {"processor": _processor(), "processor cores": os.cpu_count()}
    found |= {name: os.environ[name] for name in VARIABLES if name in os.environ}
    return {name: value for name, value in found.items() if value}


def _processor() -> str:
    """Name, family and model of the processor."""
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    found = dict(re.findall(r"^(model name|cpu family|model)\s*:\s*(.+)$", text, re.MULTILINE))
    named = {"model name": "{}", "cpu family": "family {}", "model": "model {}"}
    return ", ".join(form.format(found[name]) for name, form in named.items() if name in found)


def commit() -> str:
    """The commit of the clone that runs, with "+" and a digest of its uncommitted changes.

    A copy without its history has the commit in the variable UNIMM_COMMIT, which `launch/tpu.py` sets; otherwise it is
    empty.
    """
    root = pathlib.Path(__file__).parent.parent
    if not (root / ".git").exists():
        return os.environ.get("UNIMM_COMMIT", "")
    try:
        head, changes = (
            subprocess.run(["git", "-C", str(root), *words], capture_output=True, timeout=20, check=True).stdout
            for words in (["rev-parse", "HEAD"], ["diff", "HEAD", "--", "unimm_jax", "configs"])
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return head.decode().strip() + (f"+{hashlib.sha256(changes).hexdigest()[:8]}" if changes else "")


def weights(config: Config, workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The checkpoints and published weights that `config.init_from` names, with digests of their files."""
    found = []
    for entry in config.init_from:
        path = storage.at(workdir, entry["checkpoint"])
        try:
            step = checkpoint.find(path)
            digest = json.loads((step / checkpoint.DIGESTS).read_text())["self"][:16]
            found.append({"path": str(path), "step": step.name, "digest": digest})
        except CheckpointError:
            files = [path / name for name in storage.files_under(path)] if path.is_dir() else [path]
            found.append(
                {"path": str(path), "digest": fingerprint_files(path if path.is_dir() else path.parent, files)}
            )
    return found


def bands(rows: Iterable[dict[str, Any]], steps: int) -> list[dict[str, Any]]:
    """Median and 10% and 90% quantiles of the logged loss for each twentieth of a run that has logged lines."""
    rows, found = list(rows), []
    for i in range(BANDS):
        before, last = i * steps // BANDS, (i + 1) * steps // BANDS
        losses = [row["loss"] for row in rows if before < row["step"] <= last and "loss" in row]
        if losses:
            low, median, high = (round(float(x), 6) for x in np.percentile(losses, (10, 50, 90)))
            found.append({"steps": f"{before + 1}-{last}", "p10": low, "median": median, "p90": high})
    return found


def _digest(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _text(value: Any, indent: int = 0) -> str:
    """JSON in which every list and dict that fits is one line."""
    line = json.dumps(value, ensure_ascii=False)
    if not value or not isinstance(value, dict | list) or len(line) + indent <= WIDTH:
        return line
    pad, is_dict = " " * (indent + 1), isinstance(value, dict)
    start, end = "{}" if is_dict else "[]"
    items = [(f"{json.dumps(k)}: ", value[k]) for k in value] if is_dict else [("", item) for item in value]
    return start + ",".join(f"\n{pad}{name}{_text(v, indent + 1)}" for name, v in items) + f"\n{' ' * indent}{end}"
