"""Checkpoints: Orbax behind one door, every save with digests of its files, verified before anything is restored.

Layout of a step: `<workdir>/checkpoints/<step>/` as Orbax writes it (`state`, `meta`), plus `digests.json`. Orbax
stores arrays without a checksum; a step without digests, or with files that do not match them, is not restored.
"""

import concurrent.futures
import functools
import hashlib
import json
import logging
import math
import pathlib
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp

from unimm_jax.sharding import flatten, unflatten

DIGESTS = "digests.json"
Tree = Any


class Damaged(Exception):
    """A checkpoint whose files are not what was written; the message names them."""


def digest(file: pathlib.Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_digests(step: pathlib.Path) -> None:
    """Writes SHA-256 digests of every file of a committed step; the last entry protects the list itself."""
    files = sorted(f for f in step.rglob("*") if f.is_file() and f.name != DIGESTS)
    found = {str(f.relative_to(step)): digest(f) for f in files}
    body = json.dumps(found, indent=0, sort_keys=True)
    text = json.dumps({"files": found, "self": hashlib.sha256(body.encode()).hexdigest()})
    partial = step / (DIGESTS + ".partial")
    partial.write_text(text)
    partial.rename(step / DIGESTS)


def verify(step: pathlib.Path) -> None:
    """Compares a step's files with its digests.

    Raises:
      Damaged: names every file that is missing, changed or unexpected, and the parameter where the name tells it.
    """
    try:
        text = (step / DIGESTS).read_text()
        listed = json.loads(text)
        files, own = dict(listed["files"]), listed["self"]
        canonical = json.dumps({"files": files, "self": own})
    except FileNotFoundError:
        raise Damaged(f"{step} has no {DIGESTS}: the save did not finish") from None
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise Damaged(f"{step / DIGESTS} is damaged: {error}") from None
    body = json.dumps(files, indent=0, sort_keys=True)
    if text != canonical or hashlib.sha256(body.encode()).hexdigest() != own:
        raise Damaged(f"{step / DIGESTS} is damaged: it does not match its own digest")
    problems = []
    for name, wanted in files.items():
        file = step / name
        if not file.exists():
            problems.append(f"{name} is missing")
        elif digest(file) != wanted:
            held = re.match(r"state/([^/]+)/", name)
            holds = f" (holds {held.group(1)})" if held and "." in held.group(1) and "ocdbt" not in name else ""
            problems.append(f"{name} has changed{holds}")
    known = {*files, DIGESTS}
    names = (str(f.relative_to(step)) for f in step.rglob("*") if f.is_file())
    problems += [f"{name} was not there when it was saved" for name in names if name not in known]
    if problems:
        raise Damaged(f"{step}: " + "; ".join(problems))


class Checkpoints:
    """The checkpoints of one workdir.

    Args (constructor):
      keep: how many of the newest stay.
      use_previous: restore the previous complete step when the newest is damaged; otherwise raise.
      in_flight_gib: how much of the arrays is on its way to disk at a time; Orbax's own bound if 0.
    """

    def __init__(self, workdir: str | pathlib.Path, keep: int = 2, use_previous: bool = True, in_flight_gib: int = 0):
        self.root = (pathlib.Path(workdir) / "checkpoints").absolute()
        self.use_previous = use_previous
        # One more than asked for: until its digests are written, a new step does not count.
        options = ocp.CheckpointManagerOptions(max_to_keep=keep + 1, enable_async_checkpointing=True)
        handlers = None
        if in_flight_gib:
            state = ocp.StandardCheckpointHandler(save_concurrent_gb=in_flight_gib)
            handlers = {"state": state, "meta": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self.root, options=options, item_handlers=handlers)
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._copies = jax.process_count() == 1 and not in_flight_gib
        self._digest: concurrent.futures.Future | None = None
        self._clock: dict[str, float] = {}

    def save(self, step: int, state: Tree, meta: dict[str, Any]) -> None:
        """Starts saving; `state` may be donated when this returns. An unfinished earlier save is waited for.

        A process on its own copies the arrays to host memory, in their turn among the device's work, and leaves the
        rest to a thread. Several processes start together, since Orbax makes them wait for each other; so does one
        that may not hold a copy (`in_flight_gib`).

        Raises:
          Exception: whatever the earlier save met with.
        """
        began = time.perf_counter()
        self.wait()
        if step in self._manager.all_steps():
            if (self.root / str(step) / DIGESTS).exists():
                return
            self._manager.delete(step)

        def start(state: Tree) -> None:
            items = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
            self._manager.save(step, args=items, force=True)

        def finish(starting: Callable[[], None] | None) -> None:
            if starting:
                starting()
            self._manager.wait_until_finished()
            if jax.process_index() == 0:
                write_digests(self.root / str(step))
            took = time.perf_counter() - began
            self._clock = {"checkpoint_seconds": took, "checkpoint_blocking": blocked / took}

        if self._copies:
            to_host = lambda x: jax.device_put(x, x.sharding.with_memory_kind("pinned_host"))
            starting = functools.partial(start, jax.tree.map(to_host, state))
        else:
            start(state)
            starting = None
        blocked = time.perf_counter() - began
        self._digest = self._thread.submit(finish, starting)

    def read_clock(self) -> dict[str, float]:
        """Of the last save that ended since the last reading, if any: `checkpoint_seconds` from its start until it was
        on disk, and `checkpoint_blocking`, the share of them in which `save` held its caller."""
        found, self._clock = self._clock, {}
        return found

    def wait(self) -> None:
        """Returns when the last save is on disk, digests included."""
        if self._digest is not None:
            self._digest.result()
            self._digest = None

    def newest(self) -> int | None:
        """The newest step that verifies. Damaged ones are reported; see `use_previous`.

        Raises:
          Damaged: the newest is damaged and `use_previous` is off, or every one is damaged.
        """
        reports = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                verify(self.root / str(step))
                return step
            except Damaged as error:
                if not self.use_previous:
                    raise
                reports.append(str(error))
                logging.warning("checkpoint not used: %s", error)
        if reports and not all("did not finish" in r for r in reports):
            raise Damaged("no complete checkpoint is left:\n  " + "\n  ".join(reports))
        return None

    def restore(self, step: int, target: Tree) -> tuple[Tree, dict[str, Any]]:
        """(state, meta) of a verified step, laid out as `target` (abstract arrays with shardings) says."""
        items = ocp.args.Composite(state=ocp.args.StandardRestore(target), meta=ocp.args.JsonRestore())
        found = self._manager.restore(step, args=items)
        return found["state"], found["meta"]

    def close(self) -> None:
        """Waits for the last save and lets go."""
        self.wait()
        self._manager.close()
        self._thread.shutdown()


def find(path: str | pathlib.Path) -> pathlib.Path:
    """The newest verified step directory under a workdir, or the step directory itself.

    Raises:
      ValueError: nothing there.
      Damaged: what is there is damaged.
    """
    path = pathlib.Path(path).absolute()
    if (path / DIGESTS).exists() or (path / "state").exists():
        verify(path)
        return path
    steps = [p for p in (path / "checkpoints").glob("*") if p.name.isdigit()]
    reports = []
    for step in sorted(steps, key=lambda p: -int(p.name)):
        try:
            verify(step)
            return step
        except Damaged as error:
            reports.append(str(error))
            logging.warning("checkpoint not used: %s", error)
    if reports:
        raise Damaged("no complete checkpoint is left:\n  " + "\n  ".join(reports))
    raise ValueError(f"no checkpoint in {path}; give the workdir of a stage that has run")


def read_meta(path: str | pathlib.Path) -> dict[str, Any]:
    """The `meta` of a checkpoint (config, text tokenizer, fingerprints)."""
    step = find(path)
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        return reader.restore(step / "meta")


class Stored:
    """The parameters of a checkpoint, verified once and read when asked; optimiser state is not read.

    Attributes:
      shapes: path → shape.
    """

    def __init__(self, path: str | pathlib.Path):
        self.step = find(path)
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            self._held = dict(flatten(reader.metadata(self.step / "state").item_metadata.tree["params"]))
        self.shapes = {name: tuple(m.shape) for name, m in self._held.items()}

    def read(self, shardings: dict[str, Any]) -> list[tuple[str, jax.Array]]:
        """Pairs of path and array for the paths given, each on its sharding."""
        if not shardings:
            return []
        held = {path: self._held[path] for path in shardings}
        largest = max(math.prod(m.shape) * m.dtype.itemsize for m in held.values())
        reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler(restore_concurrent_gb=1 + largest // 2**30))
        target = {p: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=shardings[p]) for p, m in held.items()}
        item = {"params": unflatten(target)}
        args = ocp.args.PyTreeRestore(
            item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
        )
        params = reader.restore(self.step / "state", args=args)["params"]
        reader.close()
        return flatten(params)


def read_params(path: str | pathlib.Path, shardings: dict[str, Any] | None = None) -> Tree:
    """All parameters of a checkpoint as a nested dict.

    Args:
      shardings: path → sharding for paths that shall lie on a mesh; others go to the first device.
    """
    stored, local = Stored(path), jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return unflatten(dict(stored.read({name: (shardings or {}).get(name, local) for name in stored.shapes})))


def init_from(
    params: Tree,
    shardings: Tree,
    entries: list[dict[str, Any]],
    workdir: str | pathlib.Path,
    open_source: Callable[[pathlib.Path, dict[str, Any]], Any] = lambda path, entry: Stored(path),
) -> Tree:
    """Overlays parameters from other checkpoints, or from published weights.

    Args:
      params: freshly initialised parameters; entries: each {checkpoint, rename: [(regex, replacement)], optional:
        regex}. A source path that matches a rename goes to its new name; others are not read. Relative paths are seen
        from the workdir.
      open_source: makes what `Stored` is of a path and its entry.

    Raises:
      ValueError: a renamed parameter that this model lacks, a shape that differs, or a rename that finds nothing; all
        of them at once, before anything is read.
    """
    flat, places = dict(flatten(params)), dict(flatten(shardings))
    problems: list[str] = []
    plan: list[tuple[Any, dict[str, list[str]]]] = []
    for entry in entries:
        path = (pathlib.Path(workdir) / entry["checkpoint"]).resolve()
        source = open_source(path, entry)
        moves: dict[str, list[str]] = {}
        for pattern, replacement in entry["rename"]:
            hits = [name for name in source.shapes if re.match(pattern, name)]
            for name in hits:
                target = re.sub(pattern, replacement, name, count=1)
                if target not in flat:
                    if not re.fullmatch(entry.get("optional") or "(?!)", target):
                        problems.append(f"{target} (from {name} of {path}) is not in this model")
                elif flat[target].shape != source.shapes[name]:
                    problems.append(f"{target} is {flat[target].shape} here and {source.shapes[name]} in {path}")
                else:
                    moves.setdefault(name, []).append(target)
            if not hits:
                problems.append(f"{pattern!r} matches no parameter of {path}")
        plan.append((source, moves))
    if problems:
        raise ValueError("config.init_from:\n  " + "\n  ".join(problems))
    for source, moves in plan:
        for name, value in source.read({name: places[targets[0]] for name, targets in moves.items()}):
            for target in moves[name]:
                flat[target] = jax.device_put(value.astype(flat[target].dtype), places[target])
    return unflatten(flat)
