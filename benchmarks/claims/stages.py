"""Commands that an experiment consists of: each runs once, in a process of its own, and leaves `done.json`."""

import concurrent.futures
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent.parent
TWO_LANES = 1.25  # throughput of two processes at once on two cores, relative to one

# Settings of `--quick`, which shrink every stage until it takes seconds. A stage uses those that it has.
QUICK: dict[str, Any] = {
    "train.steps": 8,
    "train.batch_size": 8,
    "train.log_every": 4,
    "model.encoder.width": 32,
    "model.encoder.depth": 1,
    "model.encoder.heads": 2,
    "model.encoder.mlp_width": 64,
    "model.image_tokenizer.heads": 2,
    "model.image_tokenizer.mlp_width": 64,
    "model.image_tokenizer.decoder_depth": 1,
    "model.image_tokenizer.codes": 32,
    "model.image_tokenizer.code_width": 8,
    "model.text_tower.width": 32,
    "model.text_tower.joint_width": 16,
    "model.language.width": 32,
    "model.language.layers": 1,
    "model.language.heads": 2,
    "model.language.kv_heads": 1,
    "model.language.head_width": 16,
    "model.language.mlp_width": 64,
    "model.pixel_decoder.width": 32,
    "model.pixel_decoder.heads": 2,
    "model.pixel_decoder.mlp_width": 64,
    "loss.kmeans_samples": 1,
    "data.sources": "scenes:count=96",
    "evals.held_out.batches": 1,
}

# Seconds of each stage on two cores of an AMD EPYC of family 25, by size: docs/results.md, docstrings of the configs
SECONDS = {
    "laptop": dict(
        encoder=107, selector=84, tokenizer=65, records=20, pixel_decoder=47, text=36, stage1=48, stage2=123, stage3=690
    ),
    "laptop-illume": dict(encoder=130, tokenizer=72, records=20, pixel_decoder=47, text=36, stage1=48, stage2=450),
}


def compile_fast() -> None:
    """Makes the commands compile fast and run slowly, for `--quick`."""
    preset = "--xla_cpu_opt_preset=CPU_OPT_PRESET_FAST_COMPILE --xla_backend_optimization_level=0"
    os.environ.setdefault("XLA_FLAGS", preset)


@dataclasses.dataclass(frozen=True)
class Command:
    """A command of an experiment.

    Attributes:
      folder: where it writes; it is done when `folder/done.json` exists.
      module: what `python -m` runs.
      arguments: its arguments. A function if they depend on earlier commands; it is called right before the command.
      seconds: estimate of its time.
    """

    folder: pathlib.Path
    module: str
    arguments: Sequence[str] | Callable[[], Sequence[str]]
    seconds: float

    @property
    def is_done(self) -> bool:
        """Whether the command has finished."""
        return (self.folder / "done.json").exists()


def overrides_of(stage: str, size: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the settings that a stage has."""
    from unimm_jax import resolve

    config = resolve.load(f"{stage}:{size}").to_dict()

    def has(name: str) -> bool:
        node: Any = config
        for part in name.split("."):
            if not isinstance(node, dict) or part not in node:
                return False
            node = node[part]
        return True

    return {name: value for name, value in settings.items() if has(name)}


def flags_of(settings: Mapping[str, Any]) -> list[str]:
    """Settings as flags of the training command."""
    return [f"--config.{name}={value}" for name, value in settings.items()]


def training(
    stage: str,
    size: str,
    folder: pathlib.Path,
    seed: int,
    settings: Mapping[str, Any] | Callable[[], Mapping[str, Any]],
    quick: bool = False,
    seconds: float | None = None,
) -> Command:
    """The command that trains a stage as a user would.

    Args:
      settings: of the config, by dotted name, or a function that gives them when the stage starts. They take precedence
        over `QUICK`.
      seconds: estimate; that of the stage's config if None.
    """

    def arguments() -> list[str]:
        chosen = settings() if callable(settings) else settings
        small = overrides_of(stage, size, QUICK) if quick else {}
        flags = flags_of({"seed": seed} | small | dict(chosen))
        return [f"--config={stage}:{size}", f"--workdir={folder}", *flags]

    estimate = SECONDS[size][stage] if seconds is None else seconds
    return Command(folder, "unimm_jax.main", arguments, estimate)


def pretokenizing(folder: pathlib.Path, size: str, tokenizer: pathlib.Path, text_tokenizer: str = "") -> Command:
    """The command that writes records with a trained image tokenizer.

    Args:
      text_tokenizer: see `unimm_jax.pretokenize`; one is trained if empty.
    """
    flags = [f"--image_tokenizer={tokenizer}", f"--output={folder}"]
    flags += [f"--text_tokenizer={text_tokenizer}"] if text_tokenizer else []
    return Command(folder, "unimm_jax.pretokenize", flags, SECONDS[size]["records"])


def link(target: pathlib.Path, place: pathlib.Path) -> None:
    """Makes `place` a link to `target`, unless it is one already.

    Raises:
      SystemExit: something else is there, of an earlier call with other settings.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    if not place.is_symlink() and not place.exists():
        place.symlink_to(target.resolve(), target_is_directory=True)
    elif place.resolve() != target.resolve():
        raise SystemExit(f"{place} is not {target}: an earlier call had other --runs; give another --output")


def steps_of(stage: str, size: str, quick: bool) -> int:
    """Training steps of a stage."""
    from unimm_jax import resolve

    return QUICK["train.steps"] if quick else resolve.load(f"{stage}:{size}").train.steps


def link_finished(existing: pathlib.Path, name: str, place: pathlib.Path) -> None:
    """Links a stage of a finished quickstart.

    Raises:
      SystemExit: `existing` lacks it.
    """
    if not (existing / name / "done.json").exists():
        raise SystemExit(f"{existing} has no finished {name}; give the directory of a finished quickstart")
    link(existing / name, place)


def run(module: str, *arguments: str, log: pathlib.Path | None = None) -> None:
    """Runs a command of the project in a process of its own, at the root of the clone.

    Args:
      log: file for its output, appended; if None, the output is shown.

    Raises:
      SystemExit: the command failed; names the log and shows its last lines.
    """
    line = [sys.executable, "-m", module, *map(str, arguments)]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    where: dict[str, Any] = dict(cwd=ROOT, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)})
    if log is None:
        subprocess.run(line, check=True, **where)
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as stream:
        code = subprocess.run(line, stdout=stream, stderr=subprocess.STDOUT, **where).returncode
    if code:
        last = "\n".join(log.read_text().splitlines()[-8:])
        raise SystemExit(
            f"python -m {module} failed with status {code}; its output is in {log}, the end of it:\n{last}"
        )


class Progress:
    """Prints what has finished, and an estimate of the time that is left.

    The estimate scales that of the commands by the speed so far, so it also holds for several lanes.

    Args (constructor):
      commands: all of them, also those that are done.
      lanes: commands at a time.
    """

    def __init__(self, commands: Sequence[Command], lanes: int):
        open_commands = [c for c in commands if not c.is_done]
        self.total, self.left = len(commands), sum(c.seconds for c in open_commands)
        self.number = len(commands) - len(open_commands)
        self.finished, self.began, self._lock = 0.0, time.perf_counter(), threading.Lock()
        at_once = TWO_LANES if lanes > 1 else 1.0
        minutes = self.left / at_once / 60
        print(f"{len(open_commands)} of {self.total} commands to run, about {minutes:.0f} min", flush=True)

    def add(self, command: Command, name: str, seconds: float) -> None:
        """Counts a command that has finished."""
        with self._lock:
            self.number, self.left = self.number + 1, self.left - command.seconds
            self.finished += command.seconds
            slowness = (time.perf_counter() - self.began) / max(self.finished, 1e-9)
            print(
                f"[{self.number}/{self.total}] {name}: {seconds:.0f} s; about {max(self.left, 0) * slowness / 60:.0f} "
                "min left",
                flush=True,
            )


def run_all(root: pathlib.Path, by_seed: Mapping[int, Sequence[Command]], lanes: int = 1) -> None:
    """Runs the commands of every seed that are not done, in order; `lanes` seeds at a time.

    The output of a command is in `FOLDER.log` beside its folder. After a failure, no further command is started.

    Raises:
      SystemExit: a command failed.
    """
    failed = threading.Event()
    progress = Progress([command for commands in by_seed.values() for command in commands], lanes)

    def run_seed(commands: Sequence[Command]) -> None:
        for command in commands:
            if command.is_done:
                continue
            if failed.is_set():
                return
            began = time.perf_counter()
            arguments = command.arguments() if callable(command.arguments) else command.arguments
            try:
                run(command.module, *arguments, log=command.folder.parent / f"{command.folder.name}.log")
                if not command.is_done:
                    raise SystemExit(f"{command.folder} has no done.json after python -m {command.module}")
            except SystemExit:
                failed.set()
                raise
            progress.add(command, str(command.folder.relative_to(root)), time.perf_counter() - began)

    with concurrent.futures.ThreadPoolExecutor(max(lanes, 1)) as pool:
        for future in [pool.submit(run_seed, commands) for commands in by_seed.values()]:
            future.result()


def write_done(folder: pathlib.Path, seconds: float) -> None:
    """Marks what a command wrote as complete."""
    (folder / "done.json").write_text(json.dumps({"seconds": round(seconds, 1)}))
