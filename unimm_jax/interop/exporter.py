"""Exports checkpoints for PyTorch users. This file has what all formats share; each format has a file of its own.

To add one: write a file with a function like `export_hf` and add its line to `FORMATS`.
"""

import dataclasses
import importlib
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from unimm_jax import progress, resolve, storage
from unimm_jax.checkpoint import find, read_meta
from unimm_jax.errors import ConfigError, DataError, WeightMismatchError
from unimm_jax.interop import diffusion
from unimm_jax.interop.files import write_safetensors
from unimm_jax.interop.table import Entry, foreign_shapes, to_theirs

# name → "module:function"; (Source, directory, dtype or None, whether to verify) → lines of the verification
FORMATS = {
    "hf": "unimm_jax.interop.export_hf:export_hf",
    "lavit": "unimm_jax.interop.export_lavit:export_lavit",
}
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
HERE = pathlib.Path(__file__).parent


@dataclasses.dataclass
class Source:
    """The checkpoint that is exported.

    Attributes:
      path: as given. step: its step directory. meta: its metadata.
      sections: model section name → config dataclass.
    """

    path: str
    step: pathlib.Path
    meta: dict[str, Any]
    sections: dict[str, Any]


def open_source(checkpoint: str) -> Source:
    """Opens a checkpoint.

    Raises:
      CheckpointError: no checkpoint there. ConfigError: its config cannot be read.
    """
    step = find(storage.path(checkpoint))
    meta = read_meta(step)
    return Source(checkpoint, step, meta, resolve.sections_from_json(meta["config"]))


def export(checkpoint: str, output: str, form: str = "hf", dtype: str = "", verify: bool = True) -> list[str]:
    """Exports a checkpoint and prints what the verification found.

    The output directory appears under its name only when it is complete.

    Args:
      checkpoint: workdir or step directory of a language stage, or an import.
      form: a name of `FORMATS`. dtype: a name of `DTYPES`; the checkpoint's own if empty.

    Returns:
      the printed lines of the verification.

    Raises:
      ConfigError: unknown format or dtype. DataError: the output exists. CheckpointError: no checkpoint.
      UnsupportedConfigError: the format cannot represent the model.
      WeightMismatchError: the export does not compute what the checkpoint computes.
    """
    if form not in FORMATS:
        raise ConfigError(f"--format={form} is not known; formats are {', '.join(FORMATS)}")
    if dtype and dtype not in DTYPES:
        raise ConfigError(f"--dtype={dtype} is not known; dtypes are {', '.join(DTYPES)}")
    target = storage.absolute(storage.path(output))
    if target.exists():
        raise DataError(f"{output} exists; give another --output")
    source = open_source(checkpoint)
    module, _, function = FORMATS[form].partition(":")
    write = getattr(importlib.import_module(module), function)
    with storage.output_folder(target) as folder:
        lines: list[str] = write(source, folder, DTYPES[dtype] if dtype else None, verify)
    for line in lines:
        print(f"verified: {line}", flush=True)
    print(f"export: {target}", flush=True)
    return lines


class Writer:
    """Writes tables of parameters to safetensors, with progress.

    Args (constructor):
      folder: directory of the files. dtype: of all tensors.
    """

    def __init__(self, folder: pathlib.Path, dtype: np.dtype):
        self.folder, self.dtype = folder, dtype
        self.began = self.printed = time.perf_counter()

    def write(self, stem: str, table: list[Entry], params: Mapping[str, Any]) -> None:
        """Writes one file, or several with an index; one tensor in memory at a time."""
        shapes = foreign_shapes(table, {path: tuple(leaf.shape) for path, leaf in params.items()})
        tensors = to_theirs(table, params.__getitem__, shapes)
        for count, _ in enumerate(write_safetensors(self.folder, stem, shapes, self.dtype, tensors), 1):
            if time.perf_counter() - self.printed > 5:
                self.printed = time.perf_counter()
                left = (len(shapes) - count) / count * (self.printed - self.began)
                print(f"export  {stem}: {count} of {len(shapes)} tensors  ETA {progress.duration(left)}", flush=True)


def write_diffusers(folder: pathlib.Path, unet: Any, vae: Any, params: dict[str, Any], dtype: np.dtype) -> None:
    """Writes `unet/`, `vae/` and `scheduler/` as `diffusers` opens them.

    Args:
      unet, vae: config dataclasses. params: of the decoder stage, by path.
    """
    unet, vae = dataclasses.asdict(unet), dataclasses.asdict(vae)
    configs = {
        "unet/config.json": diffusion.published_unet(unet),
        "vae/config.json": diffusion.published_vae(vae),
        "scheduler/scheduler_config.json": diffusion.SCHEDULER,
    }
    for name, config in configs.items():
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(json.dumps(config, indent=1))
    shapes = {path: tuple(x.shape) for path, x in params.items()}
    for part, linear in (("unet", diffusion.linear_projection(unet)), ("vae", True)):
        table = diffusion.table(shapes, f"{part}/", linear)
        Writer(folder / part, dtype).write("diffusion_pytorch_model", table, params)


def verify_in_pytorch(folder: pathlib.Path, expected: dict[str, np.ndarray], dtype: np.dtype) -> list[str]:
    """Opens an export in a new process without JAX and compares it with numbers that JAX computed.

    Returns:
      what was compared; a sentence that says why not where torch or transformers is not installed.

    Raises:
      WeightMismatchError: the export does not open, or its float32 weights compute something else.
    """
    missing = [name for name in ("torch", "transformers", "safetensors") if importlib.util.find_spec(name) is None]
    if missing:
        return [f"not verified: {', '.join(missing)} is not installed"]
    with tempfile.TemporaryDirectory() as scratch:
        file = pathlib.Path(scratch) / "expected.npz"
        np.savez(file, **expected)  # type: ignore[arg-type]
        command = [sys.executable, "-P", str(HERE / "check_export.py"), str(folder), str(file)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=scratch)
    if done.returncode:
        raise WeightMismatchError(f"the export does not open in PyTorch:\n{done.stderr[-2000:]}")
    lines = done.stdout.strip().splitlines()
    if dtype == np.float32:
        gaps = [float(line.rsplit(" ", 1)[1]) for line in lines if "largest difference" in line]
        if not all(gap <= 1e-4 for gap in gaps) or any("DIFFER" in line for line in lines):
            raise WeightMismatchError(
                "the export computes something else than the checkpoint, please report this bug: " + "; ".join(lines)
            )
    return lines


def run_module(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a module of this package in a new process on the CPU."""
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent.parent, env=env)


def write_card(folder: pathlib.Path, source: Source, usage: list[str], library: str = "") -> None:
    """Writes `README.md`: what the export is, what it was trained on, how to load it.

    Args:
      usage: lines that say how to load it. library: `library_name` of the model hub.
    """
    config = json.loads(source.meta["config"])
    data = json.dumps(source.meta["data"], indent=1, sort_keys=True)
    name = pathlib.Path(source.path).name
    lines = ["---"] + ([f"library_name: {library}"] if library else []) + ["---", f"# {config.get('name', name)}", ""]
    lines += [f"Exported from a checkpoint of unimm_jax ({name}, step {source.meta['step']}).", "", *usage, ""]
    lines += ["## Data", "", "```json", data, "```", "", "## Config", "", "```json"]
    lines += [json.dumps(config, indent=1), "```", ""]
    (folder / "README.md").write_text("\n".join(lines))
