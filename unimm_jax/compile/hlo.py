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
      runs: number of executions. bytes: size of all results.
    """

    runs: int = 0
    bytes: int = 0


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
                found[kind].runs += times
                found[kind].bytes += times * _result_bytes(op[1], op[3] is not None)
            loop = re.search(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)", line)
            if loop:
                visit(loop[2], times * _trip_count(line, bodies.get(loop[1], [])))
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


def _trip_count(loop: str, condition: list[str]) -> int:
    """Iterations of a loop: the count that the compiler notes, else the bound in the condition."""
    noted = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop)
    bounds = [int(n) for n in re.findall(r"s32\[\]\S* constant\((\d+)\)", "\n".join(condition))]
    return int(noted[1]) if noted else max(bounds, default=1)


def _result_bytes(result: str, is_start: bool) -> int:
    """Bytes of a collective's result; a start operation has (operand, result, ...)."""
    shapes = re.findall(r"(\w+)\[([\d,]*)\]", result)
    if is_start and len(shapes) > 1:
        shapes = shapes[1:2]
    return sum(_BYTES.get(dtype, 4) * math.prod(int(n) for n in axes.split(",") if n) for dtype, axes in shapes)
