"""What a language stage draws in its first steps: counts, lengths and shares, for the page of `inspection`."""

import collections
import dataclasses
from collections.abc import Iterable, Mapping

import numpy as np

from unimm_jax.data.outlines import Outline
from unimm_jax.data.packing import Example
from unimm_jax.data.plan import Drawn, Plan
from unimm_jax.data.tasks import get

COUNTED = 100_000  # records of a source whose outlines are counted


@dataclasses.dataclass(frozen=True)
class Survey:
    """The first window of a plan: for small data, the first pass over the records.

    Attributes:
      rows: the packed rows of all its steps. sizes: number of tokens and of input images of each example.
      rejected: examples that were drawn and replaced: (record, task or "", tokens, input images).
    """

    plan: Plan
    rows: list[list[Example]]
    sizes: dict[Example, tuple[int, int]]
    rejected: list[tuple[int, str, int, int]]

    @property
    def packed(self) -> list[Example]:
        """All examples, in order."""
        return [example for row in self.rows for example in row]


def survey(plan: Plan) -> Survey:
    """Packs the first window, from the index of the records alone."""
    window = plan.first_window()

    def listed(drawn: Drawn) -> Iterable[tuple[int, ...]]:
        columns = (drawn.records, drawn.tasks, drawn.variants, drawn.tokens, drawn.images)
        return zip(*(column.tolist() for column in columns), strict=True)

    sizes = {Example(r, plan.names[task], variant): (t, i) for r, task, variant, t, i in listed(window.drawn)}
    rejected = [(r, plan.names[task] if task >= 0 else "", t, i) for r, task, _, t, i in listed(window.rejected)]
    return Survey(plan, [row for step in range(plan.window) for row in plan.rows(step)], sizes, rejected)


def spaced(count: int, limit: int) -> list[int]:
    """At most `limit` indices below `count`, evenly spaced."""
    return np.unique(np.linspace(0, count - 1, min(count, limit)).astype(int)).tolist() if count and limit else []


def groups(plan: Plan) -> list[tuple[float, dict[str, float], collections.Counter[Outline]]]:
    """Records that draw their tasks from the same shares: (weight, task → share, outline → number of records)."""
    records, default = plan.records, plan.packing.shares(0)
    everything = spaced(len(records), COUNTED)
    if not plan.packing.sources:
        return [(1.0, default, collections.Counter(records.outline(i) for i in everything))]
    found = []
    for source in plan.packing.sources:
        mine = np.flatnonzero(records.source == source.number)
        outlines = collections.Counter(records.outline(i) for i in mine[spaced(len(mine), COUNTED)].tolist())
        found.append((source.weight, dict(source.tasks) or default, outlines))
    return found


def applicable(shares: Mapping[str, float], outline: Outline) -> dict[str, float]:
    """task → share, for the tasks that apply to a record."""
    return {task: share for task, share in shares.items() if share > 0 and get(task).applies(outline)}


def target_shares(plan: Plan) -> dict[str, float]:
    """task → expected share of the examples, before any is replaced; 0 if it applies to no record."""
    found: dict[str, float] = {}
    for weight, shares, outlines in groups(plan):
        found |= {task: 0.0 for task, share in shares.items() if share > 0 and task not in found}
        fitting = {outline: fits for outline in outlines if (fits := applicable(shares, outline))}
        readable = sum(outlines[outline] for outline in fitting)
        for outline, fits in fitting.items():
            for task, share in fits.items():
                found[task] += weight * outlines[outline] / readable * share / sum(fits.values())
    total = sum(found.values()) or 1.0
    return {task: share / total for task, share in found.items()}


def chosen(found: Survey, limit: int) -> list[Example]:
    """Examples to show: the tasks take turns, and the sources within each task."""
    source, ranked = found.plan.records.source, []
    by_task: dict[str, list[tuple[int, int, Example]]] = {}
    seen: collections.Counter[tuple[str, int]] = collections.Counter()
    for place, example in enumerate(found.packed):
        kind = (example.task, int(source[example.record]))
        by_task.setdefault(example.task, []).append((seen[kind], place, example))
        seen[kind] += 1
    for task in sorted(by_task):
        first = sorted(by_task[task], key=lambda item: item[:2])[:limit]
        ranked += [(turn, task, example) for turn, (_, _, example) in enumerate(first)]
    return [example for _, _, example in sorted(ranked, key=lambda item: item[:2])[:limit]]


def without_task(plan: Plan, limit: int) -> list[int]:
    """The first `limit` records of the plan's sources to which no task applies."""
    tasks = {source.number: plan.tasks_of(i) for i, source in enumerate(plan.sources)}
    found = []
    for i in spaced(len(plan.records), COUNTED):
        names = tasks.get(int(plan.records.source[i]), tasks.get(-1))
        if names is not None and not any(get(name).applies(plan.records.outline(i)) for name in names):
            found.append(i)
            if len(found) == limit:
                break
    return found
