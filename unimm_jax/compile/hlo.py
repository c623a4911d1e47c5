"""Reads the collectives of a compiled program from its HLO text."""

import dataclasses
import math
import re

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8}


@dataclasses.dataclass
class Collective:
    """All collectives of one kind in a step on one chip.

    Attributes:
      runs: number of executions. bytes: size of all results; of reduce-scatter, of what is summed.
      sent: bytes that a chip sends at least. In a group of n chips, gathering or scattering N bytes sends
        (n - 1) / n · N, and summing N bytes on every chip twice as much.
    """

    runs: int = 0
    bytes: int = 0
    sent: float = 0.0


def count_collectives(program: str) -> dict[str, Collective]:
    """Collectives of a program by kind. Those in a loop count once per iteration.

    Args:
      program: HLO text after compilation.
    """
    bodies, entry = _computations(program)
    found = {kind: Collective() for kind in COLLECTIVES}
    seen: set[str] = set()  # an asynchronous collective has parts in several fusions, all with one channel

    def visit(name: str, times: int) -> None:
        for line in bodies.get(name, ()):
            op = re.search(rf"= (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(", line)
            channel = re.search(r"channel_id=(\d+)", line)
            if op and not (channel and channel[0] in seen):
                seen.update([channel[0]] if channel else [])
                kind = "reduce-scatter" if name.startswith("all-reduce-scatter") else op[2]
                size = times * _result_bytes(op[1], op[3] is not None)
                if kind == "reduce-scatter" and op[2] == kind:
                    size *= _group_size(line)
                found[kind].runs += times
                found[kind].bytes += size
                found[kind].sent += size * _sent_share(kind, _group_size(line))
            loop = re.search(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)", line)
            if loop:
                visit(loop[2], times * _trip_count(line, bodies.get(loop[1], []), bodies.get(loop[2], [])))
            for called in re.findall(r"(?:calls|to_apply|branch_computations)=\{?%?([\w.\-]+)", line):
                if " while(" not in line and not op:
                    visit(called, times)

    visit(entry, 1)
    return found


def _computations(program: str) -> tuple[dict[str, list[str]], str]:
    """(computation → its lines, name of the entry computation)."""
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in program.splitlines():
        start = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
        if start and not line.startswith(" "):
            name = start[2]
            bodies[name] = []
            entry = name if start[1] else entry
        elif name:
            bodies[name].append(line)
    return bodies, entry


def _trip_count(loop: str, condition: list[str], body: list[str]) -> int:
    """Iterations of a loop: the count that the compiler notes, else that of a counter from 0 with a constant bound."""
    if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop):
        return int(noted[1])
    text = "\n".join(condition)
    bounds = [int(n) for n in re.findall(r"[su]32\[\]\S* constant\((\d+)\)", text)]
    if not bounds:
        return 1
    counter = re.search(r" get-tuple-element\(.*\), index=(\d+)", text)
    step = _step(body, int(counter[1])) if counter else 1
    return math.ceil(max(bounds) / step)


def _step(body: list[str], index: int) -> int:
    """By how much a loop's body increases an element of its state. Some windowed products take two steps at a time."""
    text = "\n".join(body)
    state = re.search(r"ROOT .* tuple\((.*?)\)", text)
    if not state:
        return 1
    element = re.sub(r"/\*.*?\*/", "", state[1]).split(",")[index].strip()
    added = re.search(rf"{re.escape(element)} = \S+ add\((\S+), (\S+)\)", text)
    constants = [re.search(rf"{re.escape(x)} = \S+ constant\((\d+)\)", text) for x in (added.groups() if added else ())]
    return next((int(c[1]) for c in constants if c), 1)


def _group_size(line: str) -> int:
    """Number of chips that take part in a collective together; 0 if the line does not tell, as for permutes."""
    if groups := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(groups[1].split(","))
    if groups := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(groups[1])
    if groups := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(.*?\))* \{(.*?)\}", line):
        sizes = dict(axis.split("=") for axis in groups[1].split(","))
        return math.prod(int(sizes[axis]) for axis in groups[2].split(","))
    return 0


def _sent_share(kind: str, chips: int) -> float:
    """See `Collective.sent`."""
    share = (chips - 1) / chips if chips else 1.0
    return 2 * share if kind == "all-reduce" else share


def _result_bytes(result: str, is_start: bool) -> int:
    """Bytes of a collective's result; a start operation has (operand, result, ...)."""
    shapes = re.findall(r"(\w+)\[([\d,]*)\]", result)
    if is_start and len(shapes) > 1:
        shapes = shapes[1:2]
    return sum(_BYTES.get(dtype, 4) * math.prod(int(n) for n in axes.split(",") if n) for dtype, axes in shapes)
