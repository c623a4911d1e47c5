"""Checkpoints: Orbax with verification. Every save gets checksums of its files, checked before a restore.

Layout of a step: `<workdir>/checkpoints/<step>/` as Orbax writes it (`state`, `meta`), plus `digests.json`. Orbax
stores arrays without a checksum; a step without digests, or with files that do not match them, is not restored. The
checksums are SHA-256 on a local disk, and the MD5 that the store computed on an object store.
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import json
import logging
import math
import pathlib
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from unimm_jax import legacy, storage
from unimm_jax.errors import CheckpointError, CorruptCheckpointError, WeightMismatchError
from unimm_jax.models.vit import can_resize, resize_positions
from unimm_jax.sharding import flatten, unflatten

DIGESTS = "digests.json"
NAMED = 3  # files of a damaged checkpoint that an error names
Tree = Any


def write_digests(step: pathlib.Path) -> None:
    """Writes checksums of every file of a committed step, with the step's number and a digest of the list."""
    found = {name: value for name, value in storage.checksums(step).items() if name != DIGESTS}
    storage.write_whole(step / DIGESTS, _digest_list({"step": int(step.name), "files": found}).encode())


def _digest_list(listed: dict[str, Any]) -> str:
    """The text of `digests.json`: the list and its own digest."""
    # format 1 had no step in it
    covered = listed if "step" in listed else listed["files"]
    body = json.dumps(covered, indent=0, sort_keys=True)
    return json.dumps(listed | {"self": hashlib.sha256(body.encode()).hexdigest()})


def verify(step: pathlib.Path, contents: bool = True) -> None:
    """Compares a step's files with its digests.

    Args:
      contents: read local files to compare them; if False, only their names are compared.

    Raises:
      CorruptCheckpointError: names the first `NAMED` files that are missing, changed or unexpected, with the parameter
        where the file's name tells it, and counts the others; or says that the step was saved under another number.
      StorageError: the object store does not answer. The step may be sound, so no older one is used instead.
    """
    try:
        text = storage.read(step / DIGESTS).decode()
        listed = json.loads(text)
        files = dict(listed["files"])
        named = {"step": listed["step"]} if "step" in listed else {}
        intact = text == _digest_list(named | {"files": files})
    except FileNotFoundError:
        raise CorruptCheckpointError(f"{step} has no {DIGESTS}: the save did not finish") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptCheckpointError(f"{step / DIGESTS} is damaged: {error}") from None
    if not intact:
        raise CorruptCheckpointError(f"{step / DIGESTS} is damaged: it does not match its own digest")
    if named and step.name.isdigit() and int(step.name) != named["step"]:
        raise CorruptCheckpointError(f"{step} holds step {named['step']}: the directory was renamed or swapped")
    problems: list[str] = []
    if contents or storage.is_remote(step):
        present = storage.checksums(step, files)
    else:
        present = {name: files.get(name, "") for name in storage.files_under(step)}
    for name, wanted in files.items():
        if name not in present:
            problems.append(f"{name} is missing")
        elif present[name] != wanted:
            held = re.match(r"state/([^/]+)/", name)
            holds = f" (holds {held.group(1)})" if held and "." in held.group(1) and "ocdbt" not in name else ""
            problems.append(f"{name} has changed{holds}")
    known = {*files, DIGESTS}
    problems += [f"{name} was not there when it was saved" for name in present if name not in known]
    if problems:
        others = [f"{len(problems) - NAMED} more files differ"] if len(problems) > NAMED else []
        raise CorruptCheckpointError(f"{step}: " + "; ".join(problems[:NAMED] + others))


def refuse_s3(place: str | pathlib.Path) -> None:
    """Raises CheckpointError for a checkpoint or a workdir on s3://."""
    if str(place).startswith("s3:/"):
        raise CheckpointError(
            f"{place}: Orbax writes and reads checkpoints on local disks and gs:// only; give a path there, or mount "
            "the bucket (data sources, records and exports can be on s3://)"
        )


class Checkpoints:
    """The checkpoints of one workdir.

    Args (constructor):
      keep: number of newest steps to keep.
      use_previous: restore the previous complete step if the newest is corrupt; otherwise raise.
      in_flight_gib: bound of the arrays that are on their way to disk; Orbax's own bound if 0.
    """

    def __init__(self, workdir: str | pathlib.Path, keep: int = 2, use_previous: bool = True, in_flight_gib: int = 0):
        self.root = storage.absolute(storage.path(workdir)) / "checkpoints"
        self.use_previous = use_previous
        if jax.process_index() == 0:
            _remove_interrupted(self.root)
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
        self._corrupt: set[int] = set()  # steps that `newest` passed over

    def save(self, step: int, state: Tree, meta: dict[str, Any]) -> None:
        """Starts saving; `state` may be donated when this returns. An unfinished earlier save is waited for.

        A single process copies the arrays to host memory and leaves the rest to a thread. Several processes start the
        save together, since Orbax makes them wait for each other; so does a process that may not hold a copy
        (`in_flight_gib`).

        Raises:
          Exception: the error of the earlier save, if it failed.
        """
        began = time.perf_counter()
        self.wait()
        if step in self._manager.all_steps():
            if step not in self._corrupt and (self.root / str(step) / DIGESTS).exists():
                return
            self._manager.delete(step)  # unfinished or corrupt: written again
            self._corrupt.discard(step)

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
            starting = functools.partial(start, jax.tree.map(_to_host, state))
        else:
            start(state)
            starting = None
        blocked = time.perf_counter() - began
        self._digest = self._thread.submit(finish, starting)

    def read_clock(self) -> dict[str, float]:
        """Times of the last save that ended since the last call, if any: `checkpoint_seconds` until it was on disk, and
        `checkpoint_blocking`, the share of it during which `save` blocked its caller."""
        found, self._clock = self._clock, {}
        return found

    def wait(self) -> None:
        """Returns when the last save is on disk, digests included."""
        if self._digest is not None:
            self._digest.result()
            self._digest = None

    def newest(self) -> int | None:
        """The newest step that verifies. Corrupt ones are reported; see `use_previous`.

        Raises:
          CorruptCheckpointError: the newest is damaged and `use_previous` is off, or every one is damaged.
        """
        found, unusable = newest_intact(
            self._manager.all_steps(), lambda step: _verify_once(self.root / str(step)), self.use_previous
        )
        for step, report in unusable.items():
            self._corrupt.add(step)
            logging.warning("checkpoint not used: %s", report)
        return found

    def restore(self, step: int, target: Tree) -> tuple[Tree, dict[str, Any]]:
        """(state, meta) of a verified step.

        Args:
          target: abstract arrays with shardings.

        Raises:
          CheckpointError: the checkpoint holds other parameters, shapes or optimizer state than the target.
        """
        meta = read_meta(self.root / str(step))
        renames = legacy.param_renames(meta)
        items = ocp.args.Composite(state=ocp.args.StandardRestore(_rename_keys(target, renames.inverse)))
        try:
            found = self._manager.restore(step, args=items)["state"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self.root / str(step)} does not fit this config ({str(error).strip().splitlines()[0][:300]}); "
                "resume with the config and batch that it was trained with, or start in a new workdir"
            ) from error
        return _rename_keys(found, renames.forward), meta

    def close(self) -> None:
        """Waits for the last save and lets go, also if that save failed: threads that still write end before this does.

        Raises:
          Exception: the error of the save, if it failed.
        """
        try:
            self.wait()
        finally:
            self._manager.close()
            self._thread.shutdown()


def newest_intact(
    steps: Iterable[int], verify: Callable[[int], Any], use_previous: bool
) -> tuple[int | None, dict[int, str]]:
    """The newest step that verifies, None if a run starts from the beginning, and what is wrong with the later ones.

    Args:
      verify: raises CorruptCheckpointError for a step that cannot be used. use_previous: see `Checkpoints`.

    Raises:
      CorruptCheckpointError: the newest is damaged and `use_previous` is off, or every one is damaged.
    """
    unusable: dict[int, str] = {}
    for step in sorted(steps, reverse=True):
        try:
            verify(step)
            return step, unusable
        except CorruptCheckpointError as error:
            if not use_previous:
                raise
            unusable[step] = str(error)
    if not all("did not finish" in report for report in unusable.values()):
        raise _none_left(unusable)
    return None, unusable


def _none_left(unusable: dict[int, str]) -> CorruptCheckpointError:
    return CorruptCheckpointError("no complete checkpoint is left:\n  " + "\n  ".join(unusable.values()))


def _remove_interrupted(root: pathlib.Path) -> None:
    """Removes what interrupted saves have left, which takes space.

    On a local disk, Orbax renames a complete step; on an object store, it writes a file last.
    """
    if not storage.is_remote(root):
        for folder in root.glob("*.orbax-checkpoint-tmp"):
            shutil.rmtree(folder)
    for step in set(all_steps(root)) - set(all_steps(root, is_committed=True)):
        (root / str(step)).rmtree()  # type: ignore[attr-defined]


def all_steps(root: pathlib.Path, is_committed: bool = False) -> list[int]:
    """The steps that a directory of checkpoints has, verified or not.

    Args:
      is_committed: without those of interrupted saves on an object store, which a run removes when it starts.
    """
    steps = [int(name) for name in storage.children(root) if name.isdigit()]
    if not is_committed or not storage.is_remote(root):
        return steps
    marks = ("commit_success.txt", DIGESTS)
    return [step for step in steps if any(storage.kind(root / str(step) / file) for file in marks)]


@contextlib.contextmanager
def _without_missing_metadata_warning() -> Iterator[None]:
    """Silences one warning of Orbax: an item inside of a step has no `_CHECKPOINT_METADATA`, the step has it."""

    def is_other(record: logging.LogRecord) -> bool:
        return "Metadata file does not exist" not in record.getMessage()

    logger = logging.getLogger("absl")
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def _to_host(x: jax.Array) -> jax.Array:
    return jax.device_put(x, x.sharding.with_memory_kind("pinned_host"))


def _rename_keys(tree: Tree, names: dict[str, str]) -> Tree:
    """Renames keys of nested dicts, also inside of tuples and optimizer states."""
    if not names:
        return tree
    if isinstance(tree, dict):
        return {names.get(key, key): _rename_keys(value, names) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        items = [_rename_keys(value, names) for value in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return tree


def find(path: str | pathlib.Path) -> pathlib.Path:
    """The newest verified step directory under a workdir, or the step directory itself.

    Raises:
      CheckpointError: nothing there, or a path on s3://.
      CorruptCheckpointError: every checkpoint there is corrupt.
      StorageError: the object store does not answer.
    """
    path = storage.absolute(storage.path(path))
    refuse_s3(path)
    if storage.kind(path / DIGESTS) or storage.kind(path / "state"):
        _verify_once(path)
        return path
    root = path / "checkpoints"
    step, unusable = newest_intact(all_steps(root), lambda step: _verify_once(root / str(step)), use_previous=True)
    if step is None and unusable:
        raise _none_left(unusable)
    if step is None:
        raise CheckpointError(f"no checkpoint in {path}; give the workdir of a stage that has run")
    for report in unusable.values():
        logging.warning("checkpoint not used: %s", report)
    return root / str(step)


_verified: set[tuple[str, str]] = set()  # steps by path and text of their digests


def _verify_once(step: pathlib.Path) -> None:
    """`verify`, once per process for a step: a command that opens a checkpoint reads it several times."""
    try:
        key = str(step), storage.read(step / DIGESTS).decode()
    except (OSError, ValueError):
        key = str(step), ""
    if key not in _verified:
        verify(step)
        _verified.add(key)


def read_meta(path: str | pathlib.Path) -> dict[str, Any]:
    """The metadata of a checkpoint: `config` (JSON), `data` (header of the data), `text_tokenizer` (JSON), `step`.

    Raises:
      CheckpointError: no checkpoint, or metadata that this version cannot read.
    """
    step = find(path)
    try:
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
            found = reader.restore(step / "meta")
        written = found.get("format", 1)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the metadata of {step} cannot be read: {error}") from None
    if written > legacy.FORMAT:
        raise CheckpointError(
            f"{step} was written by a newer version (format {written}, this one reads up to {legacy.FORMAT}); update "
            "unimm_jax"
        )
    found = legacy.meta(found)
    if missing := [key for key in ("config", "data", "text_tokenizer") if key not in found]:
        raise CheckpointError(f"the metadata of {step} lacks {', '.join(missing)}: it is not a stage's checkpoint")
    return found


class Stored:
    """The parameters of a checkpoint, verified once and read on demand; the optimizer state is not read.

    Attributes:
      meta: the checkpoint's metadata. shapes: path → shape.
    """

    def __init__(self, path: str | pathlib.Path):
        self.step = find(path)
        self.meta = read_meta(self.step)
        with _without_missing_metadata_warning(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            held = flatten(reader.metadata(self.step / "state").item_metadata.tree["params"])
        renames = legacy.param_renames(self.meta)
        self._stored_names = {legacy.rename_first(name, renames.forward): name for name, _ in held}
        self._held = {legacy.rename_first(name, renames.forward): value for name, value in held}
        self.shapes = {name: tuple(m.shape) for name, m in self._held.items()}

    def read(self, shardings: dict[str, Any]) -> list[tuple[str, jax.Array]]:
        """Pairs of path and array for the paths given, each on its sharding."""
        if not shardings:
            return []
        held = {path: self._held[path] for path in shardings}
        largest = max(math.prod(m.shape) * m.dtype.itemsize for m in held.values())
        reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler(restore_concurrent_gb=1 + largest // 2**30))
        names = self._stored_names
        target = {names[p]: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=shardings[p]) for p, m in held.items()}
        item = {"params": unflatten(target)}
        args = ocp.args.PyTreeRestore(
            item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
        )
        params = dict(flatten(reader.restore(self.step / "state", args=args)["params"]))
        reader.close()
        return [(name, params[names[name]]) for name in held]


def read_params(path: str | pathlib.Path, shardings: dict[str, Any] | None = None) -> Tree:
    """All parameters of a checkpoint as a nested dict.

    Args:
      shardings: path → sharding for paths that shall lie on a mesh; others go to the first device.
    """
    stored, local = Stored(path), jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return unflatten(dict(stored.read({name: (shardings or {}).get(name, local) for name in stored.shapes})))


def init_from(
    abstract: Tree,
    init: Callable[[Collection[str]], dict[str, jax.Array]],
    entries: Sequence[dict[str, Any]],
    workdir: str | pathlib.Path,
    open_weights: Callable[[pathlib.Path, dict[str, Any]], Any] = lambda path, entry: Stored(path),
) -> Tree:
    """Parameters from other checkpoints or published weights; those that no entry gives are initialized.

    Args:
      abstract: shapes, dtypes and shardings of all parameters (`jax.ShapeDtypeStruct`).
      init: paths → path and initialized array of each. Parameters that are read are never initialized.
      entries: each {checkpoint, rename: [(regex, replacement)], optional: regex}. A source path that matches a rename
        is read under its new name; others are not read. Relative checkpoints start at the workdir. Position embeddings
        of an encoder with another image size are interpolated.
      open_weights: opens a path and its entry; returns an object with `shapes` and `read` like `Stored`.

    Raises:
      WeightMismatchError: a renamed parameter that this model lacks, another shape, or a rename that matches nothing;
        all of them at once, before anything is read.
    """
    targets_of = dict(flatten(abstract))
    problems: list[str] = []
    plan: list[tuple[Any, dict[str, list[str]]]] = []
    for entry in entries:
        path = storage.at(workdir, entry["checkpoint"])
        source = open_weights(path, entry)
        moves: dict[str, list[str]] = {}
        for pattern, replacement in entry["rename"]:
            hits = [name for name in source.shapes if re.match(pattern, name)]
            for name in hits:
                target = re.sub(pattern, replacement, name, count=1)
                if target not in targets_of:
                    if not re.fullmatch(entry.get("optional") or "(?!)", target):
                        problems.append(f"{target} (from {name} of {path}) is not in this model")
                elif targets_of[target].shape != source.shapes[name] and not can_resize(
                    target, source.shapes[name], targets_of[target].shape
                ):
                    problems.append(f"{target} is {targets_of[target].shape} here and {source.shapes[name]} in {path}")
                else:
                    moves.setdefault(name, []).append(target)
            if not hits:
                problems.append(f"{pattern!r} matches no parameter of {path}")
        plan.append((source, moves))
    if problems:
        raise WeightMismatchError("config.init_from:\n  " + "\n  ".join(problems))
    given = {target for _, moves in plan for targets in moves.values() for target in targets}
    found = init(targets_of.keys() - given)
    for source, moves in plan:
        for name, value in source.read({name: targets_of[targets[0]].sharding for name, targets in moves.items()}):
            for target in moves[name]:
                like = targets_of[target]
                if value.shape != like.shape:  # another image size
                    value = resize_positions(jnp.asarray(value, jnp.float32), like.shape[0])
                found[target] = jax.device_put(value.astype(like.dtype), like.sharding)
    return unflatten(found)
