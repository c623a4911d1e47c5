"""The plan of a language stage: which examples each step takes, and how they are packed into rows.

A plan assigns examples to steps and rows from the lengths in the index of the records. It is a function of (records,
packing config, seed), so the number of a step is the whole state of the input, for any number of processes.
"""

import collections
import dataclasses
import functools
import threading
from collections.abc import Sequence

import numpy as np

from unimm_jax.data.documents import Layout
from unimm_jax.data.outlines import Outline
from unimm_jax.data.packing import Example, PackingConfig, SourceShare, example_size, loses_slices
from unimm_jax.data.records import Records
from unimm_jax.data.sources import split_sources
from unimm_jax.data.tasks import get
from unimm_jax.errors import DataError

WINDOW = 16_384  # maximum number of examples that are planned together
SURVEYED = 8  # windows that are planned at the start to find the number of rows
CHUNK = 1 << 22  # records whose outlines are read at a time
CHECKED_SLICES = 1000  # examples whose slices are checked at the start
CACHED_WINDOWS, CACHED_STEPS = 4, 64
NO_TASK = "no task of config.data.tasks applies"


def permuted(places: np.ndarray, count: int, key: Sequence[int]) -> np.ndarray:
    """Entries of a pseudo-random permutation of range(count) at the given places, without storing the permutation.

    A Feistel network permutes the smallest power of 4 that is at least `count`; results outside of the range are
    permuted again until they are inside.

    Args:
      places: integers [N] in range(count).
      key: integers that choose the permutation.

    Returns:
      int64 [N].
    """
    half = np.uint64(max((int(count) - 1).bit_length() + 1, 2) // 2)
    low = np.uint64((1 << int(half)) - 1)
    keys = np.random.SeedSequence(list(key)).generate_state(6, np.uint64)

    def network(x: np.ndarray) -> np.ndarray:
        left, right = x >> half, x & low
        for k in keys:
            mixed = (right + k) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(32))) & low)
        return left << half | right

    found = network(places.astype(np.uint64))
    while (outside := found >= count).any():
        found[outside] = network(found[outside])
    return found.astype(np.int64)


class Turns:
    """Which source each place of the stream of examples takes its example from.

    The places of a cycle of `CYCLE` take turns in bit-reversed order, so that every stretch of the stream has the
    shares of the weights, up to a few examples. Every source has at least one place in a cycle.
    """

    CYCLE = 1 << 16

    def __init__(self, weights: Sequence[float]):
        counts = np.maximum(np.round(np.array(weights) / np.sum(weights) * self.CYCLE).astype(np.int64), 1)
        counts[counts.argmax()] += self.CYCLE - counts.sum()
        reversed_bits, places = np.zeros(self.CYCLE, np.int64), np.arange(self.CYCLE)
        for bit in range(16):
            reversed_bits |= ((places >> bit) & 1) << (15 - bit)
        self._sources = np.searchsorted(np.cumsum(counts), reversed_bits, side="right")
        self._counts = counts
        self._ranks = np.zeros(self.CYCLE, np.int64)
        for i, count in enumerate(counts.tolist()):
            self._ranks[self._sources == i] = np.arange(count)

    def of(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, number of earlier places of the same source) of each place, int [N]."""
        cycle, inside = np.divmod(places, self.CYCLE)
        sources = self._sources[inside]
        return sources, cycle * self._counts[sources] + self._ranks[inside]


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Examples with their sizes, as arrays [N].

    Attributes:
      records: index of the record. shares: number of its source in the mixture. variants: see `Example`.
      tasks: index in the plan's names of tasks, -1 if none applies.
      tokens, images: number of tokens and of input images; 0 if no task applies.
    """

    records: np.ndarray
    shares: np.ndarray
    variants: np.ndarray
    tasks: np.ndarray
    tokens: np.ndarray
    images: np.ndarray

    def take(self, chosen: np.ndarray) -> "Drawn":
        """The examples with the given indices."""
        return Drawn(*(getattr(self, field.name)[chosen] for field in dataclasses.fields(self)))

    def put(self, places: np.ndarray, other: "Drawn") -> None:
        """Overwrites the examples at the given places."""
        for field in dataclasses.fields(self):
            getattr(self, field.name)[places] = getattr(other, field.name)


@dataclasses.dataclass(frozen=True)
class Window:
    """The examples of consecutive steps.

    Attributes:
      drawn: the examples. steps: indices of the examples of each step, [K, B].
      rejected: examples that were drawn first and replaced by others of the same source.
    """

    drawn: Drawn
    steps: np.ndarray
    rejected: Drawn


@dataclasses.dataclass(frozen=True)
class Step:
    """What a step takes.

    Attributes:
      rows: its packed rows, as lists of examples. counts: its number of examples, input images and tokens.
      replaced_share: share of the examples in its window that were replaced by others.
    """

    rows: list[list[Example]]
    counts: dict[str, float]
    replaced_share: float


class Plan:
    """Assigns examples to an endless sequence of steps. Step s is a function of (records, packing, seed, s).

    Examples are drawn from an endless stream in which every source is read in pseudo-random permutations of its
    records, one pass after the other, with one task per record. The stream is planned in windows of K steps: the
    examples of a window are dealt to its steps so that every step has the same number of examples and nearly the same
    number of tokens, and those of a step are packed into rows of `packing.seq_len` tokens and `packing.images_per_row`
    images. An example that does not fit an empty row is replaced by another one of its source.

    Args (constructor):
      steps: number of steps of the run, for the choice of `rows_per_step`.
      skip_empty: whether to leave out sources without a record to which a task applies, instead of raising an error.

    Attributes:
      batch: examples per step B.
      window: steps per window K.
      rows_per_step: rows that every surveyed step fits. A later step may need more.
      unused: reason → number of records that are never drawn.
      replaced: reason → number of replaced examples in the surveyed windows. surveyed: examples in these windows.

    Raises (constructor):
      DataError: no task applies to any record of a source, or no example fits a row.
    """

    def __init__(
        self,
        records: Records,
        packing: PackingConfig,
        layout: Layout,
        seed: int,
        steps: int = 1,
        skip_empty: bool = False,
    ):
        self.records, self.packing, self.layout, self.seed = records, packing, layout, seed
        self.names = sorted({*dict(packing.weights), *dict(packing.weights_end), *_tasks_of(packing.sources)})
        self.sources: list[SourceShare] = list(packing.sources) or [SourceShare(-1, 1.0)]
        self.unused: dict[str, int] = {}
        self._members = self._find_members()
        empty = [i for i in range(len(self.sources)) if not self._count(i)]
        if empty and (not skip_empty or len(empty) == len(self.sources)):
            names = ", ".join(map(self._name, empty))
            raise DataError(f"{NO_TASK} to any record of {names} in {records.path}; raise the share of one that does")
        self.sources = [source for i, source in enumerate(self.sources) if i not in empty]
        self._members = [members for i, members in enumerate(self._members) if i not in empty]
        self._turns = Turns([source.weight for source in self.sources])
        self._lock = threading.Lock()
        self._windows: collections.OrderedDict[int, Window] = collections.OrderedDict()
        self._steps: collections.OrderedDict[int, Step] = collections.OrderedDict()
        self.batch = packing.batch
        if packing.batch_unit == "tokens":
            drawn, _ = self._usable(0, min(4096, WINDOW), np.random.default_rng([seed, 1]))
            self.batch = max(round(packing.batch / drawn.tokens.mean()), 1)
        readable = sum(self._count(i) for i in range(len(self.sources)))
        self.window = max(min(WINDOW, readable) // self.batch, 1)
        self._survey(steps)

    # ---- What a step takes ---------------------------------------------------------------------------------------

    def step(self, number: int) -> Step:
        """What a step takes. The last `CACHED_STEPS` steps are kept, so that logging one plans nothing again."""
        with self._lock:
            if number not in self._steps:
                window = self._window(number // self.window)
                drawn = window.drawn.take(window.steps[number % self.window])
                counts = dict(examples=len(drawn.tokens), images=drawn.images.sum(), tokens=drawn.tokens.sum())
                share = len(window.rejected.records) / window.steps.size
                rows = self._pack(window, number % self.window)
                self._steps[number] = Step(rows, {name: float(count) for name, count in counts.items()}, share)
                while len(self._steps) > CACHED_STEPS:
                    self._steps.popitem(last=False)
            return self._steps[number]

    def rows(self, step: int) -> list[list[Example]]:
        """The packed rows of a step, as lists of examples; at least one row, none of them empty."""
        return self.step(step).rows

    def first_window(self) -> Window:
        """The examples of the first `window` steps."""
        with self._lock:
            return self._window(0)

    def notes(self, rows: int = 0) -> list[str]:
        """What a user should know about the data: shares of the tasks, fill, and what is replaced or never read.

        Args:
          rows: rows of a step with padding rows; 0 is `rows_per_step`.
        """
        rows = rows or self.rows_per_step
        window = self.first_window()
        counts = np.bincount(window.drawn.tasks, minlength=len(self.names))
        ranked = sorted(zip(counts, self.names, strict=True), reverse=True)
        shares = ", ".join(f"{name} {count / counts.sum():.1%}" for count, name in ranked if count)
        mean = window.drawn.tokens.mean()
        fill = self.batch * mean / (rows * self.packing.seq_len)
        found = [
            f"{self.batch} examples per step of {mean:.1f} tokens on average, in {rows} rows of "
            f"{self.packing.seq_len} tokens ({fill:.0%} full): {shares}"
        ]
        found += [f"{n} of {len(self.records)} records are never read: {why}" for why, n in self.unused.items()]
        for why, count in self.replaced.items():
            found.append(f"{count} of {self.surveyed} examples were replaced by others: {why}")
        if without := self._without_slices(window):
            found.append(
                f"{without} of {min(len(window.drawn.tasks), CHECKED_SLICES)} examples are read without their slices, "
                "which do not fit a row; raise config.data.seq_len or images_per_row"
            )
        return found

    def _without_slices(self, window: Window) -> int:
        """How many of the first `CHECKED_SLICES` examples of a window are read whole because slices do not fit."""
        if not self.packing.max_slices:
            return 0
        first = window.drawn.take(np.arange(min(len(window.drawn.tasks), CHECKED_SLICES)))
        places = zip(first.records.tolist(), first.tasks.tolist(), first.variants.tolist(), strict=True)
        examples = (Example(record, self.names[task], variant) for record, task, variant in places)
        return sum(loses_slices(self.records, example, self.packing, self.layout) for example in examples)

    # ---- Windows -------------------------------------------------------------------------------------------------

    def _survey(self, steps: int) -> None:
        """Plans windows of the whole run to find the number of rows."""
        last = (max(steps, 1) - 1) // self.window
        chosen = np.unique(np.linspace(0, last, min(last + 1, SURVEYED)).round().astype(int)).tolist()
        replaced: collections.Counter[str] = collections.Counter()
        self.rows_per_step = self.surveyed = 0
        for number in chosen:
            window = self._window(number)
            used = min(self.window, steps - number * self.window) if number == last else self.window
            needed = [len(self._pack(window, i)) for i in range(max(used, 1))]
            self.rows_per_step = max(self.rows_per_step, *needed)
            self.surveyed += window.steps.size
            replaced.update(self.reasons(window.rejected))
        self.replaced = dict(replaced)

    def _window(self, number: int) -> Window:
        if number not in self._windows:
            self._windows[number] = self._plan_window(number)
            while len(self._windows) > CACHED_WINDOWS:
                self._windows.popitem(last=False)
        self._windows.move_to_end(number)
        return self._windows[number]

    def _plan_window(self, number: int) -> Window:
        rng = np.random.default_rng([self.seed, 2, number])
        drawn, rejected = self._usable(number * self.window * self.batch, self.window * self.batch, rng)
        return Window(drawn, deal(drawn.tokens, self.window, rng), rejected)

    def _pack(self, window: Window, index: int) -> list[list[Example]]:
        chosen = window.steps[index]
        drawn = window.drawn.take(chosen)
        row_of = pack(drawn.tokens, drawn.images, self.packing.seq_len, self.packing.images_per_row)
        rows: list[list[Example]] = [[] for _ in range(row_of.max() + 1)]
        for row, record, task, variant in zip(
            row_of.tolist(), drawn.records.tolist(), drawn.tasks.tolist(), drawn.variants.tolist(), strict=True
        ):
            rows[row].append(Example(record, self.names[task], variant))
        return rows

    # ---- The stream of examples ----------------------------------------------------------------------------------

    def _usable(self, start: int, count: int, rng: np.random.Generator) -> tuple[Drawn, Drawn]:
        """Examples `start` to `start + count` of the stream; those that do not fit a row are replaced.

        Returns:
          the examples, and those that were replaced.
        """
        drawn = self._draw(start, count, rng)
        bad = np.flatnonzero(~self.fits(drawn))
        rejected = drawn.take(bad)
        for _ in range(20):  # other records of the same sources
            if not len(bad):
                return drawn, rejected
            shares = drawn.shares[bad]
            records = np.array([self._member(i, rng.integers(self._count(i), size=1))[0] for i in shares.tolist()])
            drawn.put(bad, self._measure(records, shares, start, rng))
            bad = bad[~self.fits(drawn.take(bad))]
        good, shares = np.flatnonzero(self.fits(drawn)), drawn.shares[bad]
        for i in np.unique(shares).tolist():
            fitting = good[drawn.shares[good] == i]
            if not len(fitting):
                found = self.reasons(rejected.take(rejected.shares == i))
                reasons = "; ".join(f"{count} × {reason}" for reason, count in found.items())
                raise DataError(
                    f"no example of {self._name(i)} fits a row of {self.packing.seq_len} tokens and "
                    f"{self.packing.images_per_row} images ({reasons}); raise config.data.seq_len or images_per_row, "
                    "or choose other tasks in config.data.tasks"
                )
            mine = bad[shares == i]
            drawn.put(mine, drawn.take(rng.choice(fitting, len(mine))))
        return drawn, rejected

    def fits(self, drawn: Drawn) -> np.ndarray:
        """Whether each example has a task and fits an empty row, boolean [N]."""
        packing = self.packing
        return (drawn.tasks >= 0) & (drawn.tokens <= packing.seq_len) & (drawn.images <= packing.images_per_row)

    def reasons(self, rejected: Drawn) -> dict[str, int]:
        """Reason → number of the examples that are replaced for it."""
        without = rejected.tasks < 0
        long = ~without & (rejected.tokens > self.packing.seq_len)
        found = {
            NO_TASK: without,
            f"longer than {self.packing.seq_len} tokens": long,
            f"more than {self.packing.images_per_row} input images": ~without & ~long,
        }
        return {reason: int(mask.sum()) for reason, mask in found.items() if mask.any()}

    def _draw(self, start: int, count: int, rng: np.random.Generator) -> Drawn:
        """Examples of the stream as drawn."""
        shares, turns = self._turns.of(np.arange(start, start + count))
        records = np.zeros(count, np.int64)
        for i in np.unique(shares).tolist():
            mine = np.flatnonzero(shares == i)
            passes, places = np.divmod(turns[mine], self._count(i))
            for number in np.unique(passes).tolist():
                inside = passes == number
                found = permuted(places[inside], self._count(i), [self.seed, 3, i, number])
                records[mine[inside]] = self._member(i, found)
        return self._measure(records, shares, start, rng)

    def _measure(self, records: np.ndarray, shares: np.ndarray, start: int, rng: np.random.Generator) -> Drawn:
        """Draws a task and a variant for each record, in proportion to the shares of the tasks that apply to it."""
        count = len(records)
        readable = sum(self._count(i) for i in range(len(self.sources)))
        by_source = self._shares(start // readable)
        draws = (rng.permutation(count) + rng.random(count)) / count  # stratified: shares are met closely
        variants = rng.integers(2**31, size=count)
        tasks, tokens, images = np.full(count, -1), np.zeros(count, int), np.zeros(count, int)

        @functools.cache
        def choices(outline: Outline, source: int) -> tuple[list[int], np.ndarray]:
            found = {n: share for n, share in by_source[source].items() if share and get(n).applies(outline)}
            ends = np.cumsum(np.array(list(found.values())) / sum(found.values()))
            return [self.names.index(name) for name in found], ends / ends[-1:]

        rows = zip(records.tolist(), shares.tolist(), draws.tolist(), variants.tolist(), strict=True)
        for place, (record, source, draw, variant) in enumerate(rows):
            names, ends = choices(self.records.outline(record), source)
            if names:
                task = tasks[place] = names[int(ends.searchsorted(draw, side="right"))]
                example = Example(record, self.names[task], variant)
                tokens[place], images[place] = example_size(self.records, example, self.packing, self.layout)
        return Drawn(records, shares, variants, tasks, tokens, images)

    def tasks_of(self, source: int) -> set[str]:
        """The tasks that examples of a source can have, in any pass."""
        shares = (self._shares(0)[source], self._shares(self.packing.epochs)[source])
        return {name for each in shares for name, share in each.items() if share > 0}

    def _name(self, source: int) -> str:
        number = self.sources[source].number
        listed = split_sources(self.records.header.get("sources", ""))
        return f"the source {listed[number]!r}" if 0 <= number < len(listed) else "the records"

    def _shares(self, epoch: int) -> list[dict[str, float]]:
        """task → share in pass `epoch`, per source."""
        default = self.packing.shares(epoch)
        return [dict(source.tasks) or default for source in self.sources]

    # ---- Records of each source ----------------------------------------------------------------------------------

    def _count(self, source: int) -> int:
        members = self._members[source]
        return len(self.records) if members is None else len(members)

    def _member(self, source: int, places: np.ndarray) -> np.ndarray:
        members = self._members[source]
        return places if members is None else members[places].astype(np.int64)

    def _find_members(self) -> list[np.ndarray | None]:
        """The records of each source to which a task applies; None is all records.

        Whether a task applies is found for every set of outline codes, on up to 64 records of each chunk, until one is
        found to which it does.
        """
        names = [self.tasks_of(i) for i in range(len(self.sources))]
        readable = [np.full(1 << 16, -1, np.int8) for _ in self.sources]  # by set of codes: -1 unknown, 0 no, 1 yes
        found: list[list[np.ndarray | None]] = [[] for _ in self.sources]  # by chunk; None is the whole chunk
        outlines, without_task, not_listed = self.records.outlines, 0, 0
        for start in range(0, len(self.records), CHUNK):
            ends = np.asarray(outlines.ends[start : start + CHUNK + 1])
            codes = np.left_shift(np.uint16(1), np.asarray(outlines.values[ends[0] : ends[-1]]).astype(np.uint16))
            sets = np.bitwise_or.reduceat(codes, ends[:-1] - ends[0])
            present = np.flatnonzero(np.bincount(sets))
            numbers = np.asarray(self.records.source[start : start + CHUNK])
            listed, read = np.zeros(len(sets), bool), np.zeros(len(sets), bool)
            for i, source in enumerate(self.sources):
                for each in present.tolist():
                    if readable[i][each] <= 0:
                        some = (start + np.flatnonzero(sets == each)[:64]).tolist()
                        readable[i][each] = any(
                            get(name).applies(self.records.outline(record)) for record in some for name in names[i]
                        )
                mine = np.ones(len(sets), bool) if source.number < 0 else numbers == source.number
                usable = mine & (readable[i][sets] > 0)
                listed, read = listed | mine, read | usable
                found[i].append(None if usable.all() else (start + np.flatnonzero(usable)).astype(np.uint32))
            without_task += int((listed & ~read).sum())
            not_listed += int((~listed).sum())
        found_unused = {NO_TASK: without_task, "config.data.mixture does not name their source": not_listed}
        self.unused = {reason: count for reason, count in found_unused.items() if count}
        return [self._joined(parts) for parts in found]

    def _joined(self, parts: list[np.ndarray | None]) -> np.ndarray | None:
        """The records of all chunks, uint32; None is all records."""
        if parts and all(part is None for part in parts):
            return None
        ends = [min(start + CHUNK, len(self.records)) for start in range(0, len(self.records), CHUNK)]
        whole = [np.arange(i * CHUNK, end, dtype=np.uint32) for i, end in enumerate(ends) if parts[i] is None]
        return np.concatenate([*whole, *(part for part in parts if part is not None), np.zeros(0, np.uint32)])


def _tasks_of(sources: Sequence[SourceShare]) -> set[str]:
    return {name for source in sources for name, _ in source.tasks}


def deal(tokens: np.ndarray, steps: int, rng: np.random.Generator) -> np.ndarray:
    """Deals examples to steps: equally many to each, with nearly equal numbers of tokens.

    The longest examples are dealt first, in rounds of one per step; the step with the fewest tokens so far gets the
    longest one of the round.

    Args:
      tokens: lengths, int [N]; N is a multiple of `steps`.

    Returns:
      indices of the examples of each step, int [steps, N / steps].
    """
    shuffled = rng.permutation(len(tokens))  # a random order of equal lengths
    order = shuffled[np.argsort(-tokens[shuffled], kind="stable")].reshape(-1, steps)
    found, totals = np.empty((steps, len(order)), np.int64), np.zeros(steps, np.int64)
    for turn, examples in enumerate(order):
        place = np.argsort(totals, kind="stable")
        found[place, turn] = examples
        totals[place] += tokens[examples]
    return found


def pack(tokens: np.ndarray, images: np.ndarray, seq_len: int, images_per_row: int) -> np.ndarray:
    """Packs examples into few rows.

    Best fit puts each example, the longest first, into the fullest row that it fits. Where that takes more rows than
    the totals ask for, the examples are also spread over fewer rows, each into the emptiest one: this helps where both
    tokens and images are scarce.

    Args:
      tokens, images: sizes of the examples, int [N]; each fits an empty row.

    Returns:
      row of each example, int [N]; rows are numbered from 0.
    """
    order = np.argsort(-tokens, kind="stable")
    best = _place(tokens, images, order, seq_len, images_per_row)
    assert best is not None
    least = max(-(-int(tokens.sum()) // seq_len), -(-int(images.sum()) // images_per_row) if images.any() else 1)
    most = int(best.max()) + 1
    while least < most:
        rows = (least + most) // 2
        spread = _place(tokens, images, order, seq_len, images_per_row, rows)
        if spread is None:
            least = rows + 1
        else:
            best, most = spread, rows
    return best


def _place(
    tokens: np.ndarray, images: np.ndarray, order: np.ndarray, seq_len: int, images_per_row: int, rows: int = 0
) -> np.ndarray | None:
    """Row of each example: best fit, or, with a number of rows, the emptiest row; None if an example fits no row."""
    found = np.empty(len(tokens), np.int64)
    count = rows or len(tokens)
    left, slots = np.full(count, seq_len), np.full(count, images_per_row)
    opened = rows
    for i in order.tolist():
        size, needs = tokens[i], images[i]
        room = left[:opened]
        fitting = np.flatnonzero((room >= size) & (slots[:opened] >= needs))
        if len(fitting):
            free = room[fitting]
            row = int(fitting[free.argmax() if rows else free.argmin()])
        elif rows:
            return None
        else:
            row, opened = opened, opened + 1
        found[i] = row
        left[row] -= size
        slots[row] -= needs
    return found
