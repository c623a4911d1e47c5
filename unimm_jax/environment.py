"""Checks of the environment of a run: versions, devices, workdir, disk, memory, data, network. Nothing is compiled."""

import contextlib
import dataclasses
import importlib.metadata
import logging
import os
import pathlib
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np

from unimm_jax import (
    checkpoint,
    distributed,
    memory,
    objectives,
    process,
    resolve,
    sharding,
    storage,
    tpu_hosts,
    variables,
)
from unimm_jax.compile import hardware
from unimm_jax.config import Config
from unimm_jax.data.pipeline import Input
from unimm_jax.errors import CorruptCheckpointError, UserError

OK, WARNING, BLOCKER = "ok", "warning", "blocker"
GIB = 2**30
CONNECT_SECONDS = 4  # how long a process tries to reach the first one
STORE_SECONDS = 4  # how long an object store has to answer
WAIT_SECONDS = 60  # how long the processes wait for each other
ROWS = 8  # of a batch that are read
UTILIZATION, PRICED = 0.4, ("v5e", "v5p", "v6e", "h100")  # model FLOPs utilization and chips of `cost`
CONTROL_GROUP = pathlib.Path("/sys/fs/cgroup")
CONTROL_GROUPS = (  # limit, use, and in memory.stat the files that can be dropped; versions 2 and 1
    ("memory.max", "memory.current", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
)
PAIRS = {  # package → the extra of jax that requires it
    "jaxlib": "",
    "libtpu": "tpu",
    "jax-cuda12-plugin": "cuda12",
    "jax-cuda13-plugin": "cuda13",
}


@dataclasses.dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
      level: `OK`, `WARNING`, or `BLOCKER` if a run cannot work. check: its name. text: what is so. remedy: what to do.
    """

    level: str
    check: str
    text: str
    remedy: str = ""

    def line(self) -> str:
        """One line for the console."""
        return f"{self.level:8s} {self.check}: {self.text}" + (f". Remedy: {self.remedy}" if self.remedy else "")


def findings(config: Config | None, workdir: str, chips: int, platform: str) -> Iterator[Finding]:
    """What the checks found that need the devices, one after another. The processes are connected.

    Args:
      config: of the stage to run; its memory, paths and data are checked if given. workdir: checked if not empty.
      chips: number of devices that there should be, 0 for any. platform: "tpu", "gpu", "cpu", or "" for any.
    """
    yield from devices(chips, platform)
    try:
        distributed.find_devices()
    except UserError:
        return  # the other checks need them
    store_answers = True
    for finding in workdir_checks(workdir, config) if workdir else ():
        is_bad = finding.level == BLOCKER and finding.check == "workdir"
        store_answers &= not (is_bad and storage.is_remote(workdir))
        yield finding
    if config is not None:
        data, read = inputs(config, workdir) if workdir and store_answers else (None, [])
        yield from (*mesh(config, data), *device_memory(config, data), *host_memory(config, data), *read)
        yield from cost(config, data)


def warn(config: Config, workdir: pathlib.Path, size: int) -> None:
    """Prints a line for versions that do not fit jax, and for a disk that checkpoints of `size` bytes would fill."""
    found = list(versions())
    if not storage.is_remote(workdir):
        found.append(_disk(workdir, config, size))
    for finding in found:
        if finding.level != OK:
            logging.warning("%s: %s. %s", finding.check, finding.text, finding.remedy)


def versions() -> Iterator[Finding]:
    """Whether jaxlib and what drives the devices are the versions that this jax is made for."""
    names = ("jax", *PAIRS, "flax", "orbax-checkpoint")
    there = {name: version for name in names if (version := _version(name))}
    bad = False
    for name, extra in PAIRS.items():
        wanted = _requirement(name, extra)
        if name in there and wanted and not _satisfies(there[name], wanted):
            bad = True
            remedy = f"pip install 'jax{f'[{extra}]' if extra else ''}=={there['jax']}'"
            yield Finding(BLOCKER, "versions", f"{name} {there[name]}, jax {there['jax']} needs {name}{wanted}", remedy)
    if not bad:
        yield Finding(OK, "versions", ", ".join(f"{name} {version}" for name, version in there.items()))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _requirement(package: str, extra: str) -> str:
    """What jax, with an extra, requires of a package, such as "==0.0.35"; empty if nothing."""
    marker = f'extra == "{extra}"' if extra else ""
    for line in importlib.metadata.requires("jax") or ():
        requirement, _, condition = (part.strip() for part in line.partition(";"))
        name = re.match(r"[\w.-]+", requirement)
        if name and name[0] == package and condition.replace("'", '"') == marker:
            return re.sub(r"^\[.*?\]", "", requirement[len(package) :].strip()).strip()
    return ""


def _satisfies(version: str, wanted: str) -> bool:
    """Whether a version meets conditions like "<=0.10.2,>=0.10.2" or "==0.0.35.*"."""

    def numbers(text: str) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", text.partition("+")[0])]

    here = numbers(version)
    for condition in wanted.split(","):
        operator, number = re.fullmatch(r"\s*([<>=!~]+)\s*(.+?)\s*", condition).groups()  # type: ignore[union-attr]
        there = numbers(number)
        length = len(there) if number.endswith("*") else max(len(there), len(here))
        a, b = ((part + [0] * length)[:length] for part in (here, there))
        met = {"==": a == b, "<=": a <= b, ">=": a >= b, "<": a < b, ">": a > b, "!=": a != b}
        if not met.get(operator, True):
            return False
    return True


def coordinator() -> Iterator[Finding]:
    """Whether the first process can be reached, for a run whose processes are numbered by hand.

    The first process listens when it connects the others, so it has nothing to check here.
    """
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if not address or os.environ.get("JAX_PROCESS_ID") == "0":
        return
    host, _, port = address.rpartition(":")
    end = time.monotonic() + CONNECT_SECONDS
    while True:
        try:
            socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and time.monotonic() < end:
                time.sleep(0.5)  # it may be starting
                continue
            remedy = "start process 0, open the port in the firewall, or correct JAX_COORDINATOR_ADDRESS"
            yield Finding(BLOCKER, "network", f"the coordinator {address} cannot be reached ({error})", remedy)
        else:
            yield Finding(OK, "network", f"{address} answers")
        return


def connection() -> Iterator[Finding]:
    """Connects the processes of a run; ends this process, after a line, if they do not come within `WAIT_SECONDS`."""
    seconds = int(variables.number("UNIMM_START_SECONDS", WAIT_SECONDS))
    remedy = "start the same command on all hosts; end an earlier process that holds the port or the TPU"
    found = Finding(BLOCKER, "network", f"the processes did not connect within {seconds} s", remedy)

    def end() -> None:
        print(found.line(), flush=True)
        os._exit(1)  # JAX would abort the process, with a stack

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        distributed.connect(10 * seconds)
    except UserError as error:
        yield Finding(BLOCKER, "network", str(error).replace("\n", " "))
    finally:
        timer.cancel()


def devices(chips: int, platform: str) -> Iterator[Finding]:
    """Whether JAX uses the devices of the machine, and those that were asked for."""
    remedies = {
        "tpu": "pip install 'jax[tpu]'; end other processes that hold the TPU",
        "gpu": "pip install 'jax[cuda13]'",
    }
    try:
        there = distributed.find_devices()
    except UserError as error:
        yield Finding(BLOCKER, "devices", str(error))
        return
    kind, text = there[0].platform, f"{len(there)} × {there[0].device_kind} in {jax.process_count()} processes"
    on_cpu = kind == "cpu" and os.environ.get("JAX_PLATFORMS") != "cpu"
    if on_cpu and process.has_accelerator():
        has = "tpu" if tpu_hosts.has_tpu() else "gpu"
        yield Finding(BLOCKER, "devices", f"this machine has a {has.upper()}, and JAX uses the CPU", remedies[has])
    elif platform and kind != platform:
        yield Finding(BLOCKER, "devices", f"{text}, not {platform}", remedies.get(platform, "unset JAX_PLATFORMS"))
    elif chips and len(there) != chips:
        hosts = tpu_hosts.number_of_hosts()
        remedy = "check the type of the TPU"
        if hosts > jax.process_count():
            remedy = f"start the same command on all {hosts} hosts"
        yield Finding(BLOCKER, "devices", f"{text}, not {chips}", remedy)
    else:
        yield Finding(OK, "devices", text)


def workdir_checks(workdir: str, config: Config | None) -> Iterator[Finding]:
    """Whether the workdir can be written, is one for all processes, has room, and holds a usable checkpoint."""
    # every process says what it found before any goes on, so that none waits for one that cannot
    path, problem, began = pathlib.Path(), "", time.perf_counter()
    try:
        path = storage.absolute(storage.path(workdir))
        checkpoint.refuse_s3(path)
    except UserError as error:
        problem = str(error)
    if bad := _problems(problem):
        yield Finding(BLOCKER, "workdir", bad)
        return
    is_there, problem = _look(path)
    if bad := _problems(problem):
        yield Finding(BLOCKER, "workdir", f"{workdir} cannot be read ({bad})", "check the path and its permissions")
        return
    is_new = not any(distributed.gather(b"1" if is_there else b""))
    try:
        if bad := _problems(_write_probe(path)):
            text = f"{workdir} cannot be written ({bad})"
            yield Finding(BLOCKER, "workdir", text, "check the path and its permissions")
            return
        distributed.check_shared(path)
        text = f"{path} can be written ({time.perf_counter() - began:.1f} s), by {jax.process_count()} processes"
        yield Finding(OK, "workdir", text)
        if storage.is_remote(path):
            yield _cache()
        elif config is not None:
            yield _disk(path, config, memory.needs(config).checkpoint)
    except UserError as error:
        yield Finding(BLOCKER, "workdir", str(error))
        return
    finally:
        if is_new and not storage.is_remote(path):
            with contextlib.suppress(OSError):  # another process has removed it, or uses it
                path.rmdir()
    try:
        has_checkpoints = bool(storage.kind(path / "checkpoints"))
    except UserError as error:
        yield Finding(BLOCKER, "checkpoint", str(error))
        return
    if has_checkpoints:
        yield _checkpoint(path, config is None or config.train.use_previous_checkpoint)


def _look(path: pathlib.Path) -> tuple[bool, str]:
    """Whether something is at a path, and why that cannot be said, in one line, if its store refuses or is slow."""
    found: list[str | Exception] = []

    def ask() -> None:
        try:
            found.append(storage.kind(path))
        except Exception as error:
            found.append(error)

    asking = threading.Thread(target=ask, daemon=True)  # a client library may try again for minutes
    asking.start()
    asking.join(STORE_SECONDS)
    if not found:
        return False, f"no answer within {STORE_SECONDS} s"
    (answer,) = found
    if isinstance(answer, UserError | OSError):
        return False, str(answer)
    if isinstance(answer, Exception):
        raise answer
    return bool(answer), ""


def _problems(problem: str) -> str:
    """What the processes say is wrong, with their numbers if they are several; empty if nothing is."""
    said = [reason.decode() for reason in distributed.gather(problem.encode())]
    bad = [f"process {i}: {reason}" if len(said) > 1 else reason for i, reason in enumerate(said) if reason]
    return "; ".join(bad)[:600]


def _write_probe(path: pathlib.Path) -> str:
    """Writes a file in a directory and removes it: why that is not possible, in one line, or nothing."""
    probe = path / f".preflight-{os.getpid()}-{jax.process_index()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"-")
        probe.unlink()
    except Exception as error:  # a store raises errors of its client library
        return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ""


def _disk(path: pathlib.Path, config: Config, size: int) -> Finding:
    """Whether there is room for the checkpoints that are kept, one whose digests are written, and one being saved."""
    count, root = config.train.keep + 2, path / "checkpoints"
    there = _size(root)
    needed = max(size * count - there, 0)
    free = shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists())).free
    text = f"{free / GIB:.1f} GiB free, {count} checkpoints need {needed / GIB:.1f} GiB{' more' if there else ''}"
    if needed > free:
        return Finding(BLOCKER, "disk", text, "free space, lower config.train.keep, or give a --workdir elsewhere")
    return Finding(OK, "disk", text)


def _size(folder: pathlib.Path) -> int:
    """The bytes of all files under a local folder, 0 if there is none; others may remove files meanwhile."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(os.path.join(place, name)).st_size
    return total


def _checkpoint(path: pathlib.Path, use_previous: bool) -> Finding:
    """Where the run would resume, by the rule of `Checkpoints.newest`; the files of local checkpoints are not read."""
    root = path / "checkpoints"
    try:
        steps = checkpoint.all_steps(root, is_committed=True)
        step, unusable = checkpoint.newest_intact(
            steps, lambda step: checkpoint.verify(root / str(step), contents=False), use_previous
        )
    except CorruptCheckpointError as error:
        remedy = f"remove {root} to start from the beginning, or copy it again"
        if not use_previous:
            remedy = "set config.train.use_previous_checkpoint to resume from the one before, if there is one"
        return Finding(BLOCKER, "checkpoint", str(error).replace(":\n  ", ": ").replace("\n  ", "; "), remedy)
    except UserError as error:
        return Finding(BLOCKER, "checkpoint", str(error))
    if step is None:
        return Finding(OK, "checkpoint", "there is no complete one, the run would start from the beginning")
    text = f"the run would resume from step {step}"
    if unusable:
        reason = " ".join(next(iter(unusable.values())).split())
        return Finding(WARNING, "checkpoint", f"{text}, because {reason}", "none needed")
    return Finding(OK, "checkpoint", text)


def mesh(config: Config, data: Input | None) -> Iterator[Finding]:
    """Whether the mesh fits the devices, and the batch the mesh."""
    try:
        found = sharding.make_mesh(config.mesh)
        if data is not None:
            parts = config.train.micro_batches
            sharding.check_batch(found, data.size(0, sharding.batch_ways(found) * parts), parts)
        yield Finding(OK, "mesh", ", ".join(f"{name} {size}" for name, size in found.shape.items()))
    except UserError as error:
        yield Finding(BLOCKER, "mesh", str(error))


def _cache() -> Finding:
    """Whether there is room for the copies of files on object stores."""
    folder, bound = storage.cache_folder(), storage.cache_bound()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    used = _size(folder)
    free = shutil.disk_usage(there).free
    text = f"{free / GIB:.1f} GiB free in {there}, copies take up to {bound / GIB:g} GiB"
    if free < bound - used:
        remedy = "lower UNIMM_CACHE_GIB, or set UNIMM_CACHE_DIR to a folder on another disk"
        return Finding(WARNING, "cache", text, remedy)
    return Finding(OK, "cache", text)


def device_memory(config: Config, data: Input | None) -> Iterator[Finding]:
    """Whether a step can fit the devices; on a CPU, whether parameters, gradients and optimizer state do."""
    try:
        text = f"{memory.check_devices(config).checkpoint / GIB:.2f} GiB of parameters and optimizer state fit"
    except UserError as error:
        yield Finding(BLOCKER, "device memory", str(error))
        return
    if not (limit := memory.device_limit()):
        yield Finding(OK, "device memory", f"{text}; python -m unimm_jax.aot adds activations")
        return
    with contextlib.suppress(UserError):  # a mesh that does not fit has a line of its own
        state, saved = memory.device_least(config, sharding.make_mesh(config.mesh), data)
        text = f"a step takes at least {(state + saved) / GIB:.2f} GiB of the {limit / GIB:.2f} GiB of a device"
        accumulates = objectives.get(config.objective).accumulates
        if state > limit:
            yield Finding(BLOCKER, "device memory", text, "more devices on the axis fsdp or tensor of config.mesh")
        elif state + saved > limit:
            smaller = "a larger config.train.micro_batches" if accumulates else "a smaller config.train.batch_size"
            yield Finding(BLOCKER, "device memory", text, f"more devices, or {smaller}")
        else:
            yield Finding(OK, "device memory", f"{text}; python -m unimm_jax.aot gives the peak")


def host_memory(config: Config, data: Input | None) -> Iterator[Finding]:
    """Whether this process fits the memory of the host."""
    phases, free = memory.host_phases(config, data), _available()
    needed = max(phases.values())
    of = "" if data else " with a vocabulary of the published size"
    said = ", ".join(f"{size / GIB:.1f} GiB to {name}" for name, size in phases.items())
    text = f"about {said}{of}; {free / GIB:.1f} GiB are free"
    if needed > free:
        yield Finding(BLOCKER, "host memory", text, "end other programs, or use more hosts")
    else:
        yield Finding(OK, "host memory", text)


def _available() -> int:
    """Free memory of the host, or of the container: a limit of its control group counts, too."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for line in _lines(pathlib.Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    for limit, used, cache in CONTROL_GROUPS:
        bounds = [next(iter(_lines(CONTROL_GROUP / name)), "") for name in (limit, used)]
        if all(bound.isdigit() for bound in bounds):
            stat = dict(line.split() for line in _lines(CONTROL_GROUP / pathlib.Path(limit).parent / "memory.stat"))
            free = min(free, max(int(bounds[0]) - int(bounds[1]) + int(stat.get(cache, 0)), 0))
    return free


def _lines(file: pathlib.Path) -> Iterable[str]:
    return file.read_text().splitlines() if file.exists() else ()


def cost(config: Config, data: Input | None) -> Iterator[Finding]:
    """The chip-hours of the run at a utilization of `UTILIZATION`, if they are worth a line."""
    objective_class = objectives.get(config.objective)
    objective = objective_class(config, data or objective_class.abstract_input(config))
    spec = objective_class.batch_spec(config, objective_class.batch_rows(config))
    batch = {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in spec.items()}
    flops, steps = objective.step_flops(batch), config.train.steps
    chips = {chip.name: chip.flops for chip in hardware.CHIPS.values()}
    hours = {name: steps * flops / (chips[name] * UTILIZATION * 3600) for name in PRICED}
    if max(hours.values()) < 1:
        return
    text = ", ".join(f"{value:,.0f} of {name}" for name, value in hours.items())
    yield Finding(
        OK, "cost", f"{flops / 1e15:.3g} PFLOP per step, {steps:,} steps: {text} (chip-hours at {UTILIZATION:.0%} MFU)"
    )


def _records_on_store(config: Any) -> Iterator[Finding]:
    """Whether the cache holds all records on an object store: examples are read in random order."""
    if storage.is_remote(getattr(config.data, "records", "")):
        size, bound = storage.total_size(storage.path(config.data.records)), storage.cache_bound()
        if size > bound:
            text = (
                f"the records have {size / GIB:.1f} GiB, copies take up to {bound / GIB:g} GiB, and they are read in "
            )
            text += "random order, so they are fetched again and again"
            remedy = "raise UNIMM_CACHE_GIB, or mount the bucket (Cloud Storage FUSE)"
            yield Finding(WARNING, "cache", text, remedy)


def inputs(config: Config, workdir: str) -> tuple[Input | None, list[Finding]]:
    """The stage's data, and whether the records and checkpoints of the config are there, and a batch can be read."""
    try:
        resolve.check_paths(config, workdir)
        began = time.perf_counter()
        parsed: Any = config
        if hasattr(config.data, "records"):
            records = str(storage.at(workdir, config.data.records))
            parsed = dataclasses.replace(config, data=dataclasses.replace(config.data, records=records))
        data = objectives.get(parsed.objective).open_input(parsed, None)
        opened = time.perf_counter()
        data.batch(0, lambda rows: (np.arange(ROWS) + jax.process_index()) % rows)
        text = f"opened in {opened - began:.1f} s, rows of a batch read in {time.perf_counter() - opened:.2f} s"
        return data, [Finding(OK, "data", text), *_records_on_store(parsed)]
    except UserError as error:
        return None, [Finding(BLOCKER, "data", str(error).replace("\n", " "))]
