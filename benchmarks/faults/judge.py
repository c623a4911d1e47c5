"""What a process said when it ended, what a run left, and how that differs from an undisturbed run."""

import hashlib
import json
import pathlib
import re
from collections.abc import Iterable
from typing import Any

from unimm_jax import distributed, metrics, process

# Metrics that are times: the only ones that may differ
_TIMES = re.compile(r".*(_ms|_seconds|_per_second|_blocking)|goodput|input_stall|mfu")
TRACEBACK = "Traceback (most recent call last)"
# JAX ends a process itself, with SIGABRT, when it notices before the training loop does that another one is lost
JAX_ABORT = "JAX distributed service detected fatal errors"
# what a process says when a fault makes it refuse to go on
REFUSALS = {
    "full disk": r"[Nn]o space left|quota",
    "missing file": r"is missing|are missing|is damaged|holds no finished records|[Nn]o such file",
    "store errors": r"the object store refuses or cannot be reached",
    "store down": r"the object store refuses or cannot be reached",
}
# what one of several processes may also say
OTHER_PROCESSES = r"another process of this run|the processes of this run did not connect|does not see the workdir"


def verdict(status: int, said: str, sent: Iterable[int] = ()) -> str:
    """How a process ended: "finished", "stopped", "killed", "refused: LINE", "aborted by JAX" or "failure: REASON".

    Args:
      status: exit status, negative for a signal. said: its output. sent: the signals that were sent to it.
    """
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    if TRACEBACK in said or "this is a bug" in said:
        lines = said[said.find(TRACEBACK) :].splitlines()
        cause = next((line for line in lines[1:] if line and not line[0].isspace()), "")
        return f"failure: traceback, status {status}: {cause[:300]}"
    if status == 0:
        return "finished"
    if -status in sent:
        return "killed"
    if status == distributed.STOPPED and "stopped by SIGTERM, saved step" in said:
        return "stopped"
    if status == -6 and JAX_ABORT in said:
        return "aborted by JAX"
    if status in (1, process.LOST_PROCESS) and errors:
        return f"refused: {errors[-1].removeprefix('error: ')[:400]}"
    return f"failure: status {status}: {' | '.join(said.splitlines()[-2:])[:300]}"


def unexpected(verdicts: Iterable[str], kinds: Iterable[str], processes: int) -> list[str]:
    """Those verdicts that no fault excuses; with several processes, one may end because another has.

    A refusal must name a fault (`REFUSALS`), or the other processes.

    Args:
      kinds: faults since the processes were started.
    """
    named = [REFUSALS[kind] for kind in kinds if kind in REFUSALS]
    excused = ["finished", "stopped", "killed"]
    if processes > 1:
        excused.append("aborted")
        named.append(OTHER_PROCESSES)
    if named:
        excused.append(f"refused: .*({'|'.join(named)})")
    return [v for v in verdicts if not re.match("|".join(excused), v)]


def left(workdir: pathlib.Path) -> dict[str, Any]:
    """What a finished run left, without times: state by leaf, position in the data, metrics, scores, names of files."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    from unimm_jax.checkpoint import find, read_meta

    step = find(workdir)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        held = reader.metadata(step / "state").item_metadata.tree
        how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), held)
        state = reader.restore(step / "state", args=ocp.args.PyTreeRestore(restore_args=how))
    meta = read_meta(step)
    return {
        "state": {jax.tree_util.keystr(k): digest(x) for k, x in jax.tree_util.tree_leaves_with_path(state)},
        "meta": {key: meta[key] for key in ("step", "iterator", "window", "data")},
        "metrics": [untimed(row) for row in metrics.read(workdir)],
        "evals": [untimed(row) for row in metrics.read(workdir, "evals.jsonl")],
        "done": json.loads((workdir / "done.json").read_text())["steps"],
        "files": sorted(file.name for file in workdir.iterdir()),
        "newest": step.name,  # others may differ: SIGTERM saves at once, and older ones are removed
        "unfinished": [file.name for file in (workdir / "checkpoints").iterdir() if not file.name.isdigit()],
    }


def digest(x: Any) -> str:
    """Type, shape and checksum of an array."""
    return f"{x.dtype} {x.shape} {hashlib.sha256(x.tobytes()).hexdigest()}"


def untimed(row: dict[str, Any]) -> dict[str, Any]:
    """A row of metrics without times."""
    return {name: value for name, value in row.items() if not _TIMES.fullmatch(name)}


def differences(wanted: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Sentences on what differs, a few per part; empty if nothing does."""
    sentences = []
    for part, whole in wanted.items():
        other = found[part]
        if json.dumps(whole) == json.dumps(other):
            continue
        if isinstance(whole, dict):
            names = [key for key in sorted({*whole, *other}) if whole.get(key) != other.get(key)]
            sentences.append(f"{part}: {len(names)} entries differ, among them {', '.join(names[:3])}")
        elif isinstance(whole, list):
            missing, extra = ([x for x in a if x not in b][:1] for a, b in ((whole, other), (other, whole)))
            sentences.append(f"{part}: {len(other)} instead of {len(whole)}; missing {missing}; not expected {extra}")
        else:
            sentences.append(f"{part}: {other} instead of {whole}")
    return sentences
