"""Assesses drawings by a judge. Every verdict is on disk as soon as it is there; a run that ends early is resumed."""

import collections
import concurrent.futures
import contextlib
import itertools
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from unimm_jax import distributed, storage
from unimm_jax.enhancement.drawings import Drawing, Drawings
from unimm_jax.enhancement.files import claim, read_header
from unimm_jax.enhancement.journal import Journal, read_failures, read_verdicts, total_spent
from unimm_jax.enhancement.judges import STOPPED, Judge, open_judge
from unimm_jax.enhancement.verdicts import CATEGORIES, Verdict
from unimm_jax.errors import DataError, JudgeError, UserError
from unimm_jax.progress import Progress

FOLDER = "verdicts"  # in the directory of the drawings, where no other is given
AGAIN = "all verdicts so far are saved; run the command again to continue"


def assess(drawings: str, judge: str, output: str = "") -> dict[str, Any]:
    """Assesses the drawings that have no verdict yet. Returns the counts that it prints, and the judge's remedy.

    Blocks are split over the processes as in `drawings.draw`. A process that must stop waits for the others, then all
    stop. Drawings on which the judge fails are counted, and the next run tries them again, after all others.

    Args:
      drawings: directory that `draw` wrote; blocks that are not complete are left out.
      judge: see `judges.open_judge`. output: directory for the verdicts; `FOLDER` in that of the drawings if empty.

    Raises:
      DataError: no drawings, a wrong judge, verdicts of another judge in `output`, too many failures in a row, or no
        image can be assessed (a refused key, the limit of the cost). All verdicts so far are on disk.
      StartupError: processes do not see the same directory.
    """
    with raised_by_all():
        found, who = Drawings(storage.path(drawings)), open_judge(judge)
    folder = verdict_folder(found, output)
    distributed.check_shared(folder, "output" if output else "drawings")
    failed: collections.Counter[str] = collections.Counter()
    with raised_by_all():
        failed = _assess_share(found, who, folder)
    counts = distributed.gather(json.dumps(failed).encode())
    failed = sum((collections.Counter(json.loads(line)) for line in counts), collections.Counter())
    verdicts, spent = read_verdicts(folder), total_spent(folder)
    size = found.header["block"]
    drawn = sum(min((block + 1) * size, len(found)) - block * size for block in found.complete())
    summary = counts_of(verdicts) | {"remaining": drawn - len(verdicts), "not_drawn": len(found) - drawn}
    summary |= {"failed": dict(sorted(failed.items()))}
    summary |= {"spent": round(spent, 4)} if spent else {}
    summary |= {"unused": unused} if (unused := who.given - len(verdicts)) > 0 else {}
    if not verdicts:
        kinds = ", ".join(f"{number} × {kind}" for kind, number in failed.items()) or "no block is complete"
        raise DataError(f"none of the {len(found)} drawings in {drawings} was assessed ({kinds})")
    if jax.process_index() == 0:
        storage.write_whole(folder / "summary.json", json.dumps(summary, indent=1).encode())
        print("\n".join(lines_of(summary, len(found), who.remedy)), flush=True)
    return summary | {"remedy": who.remedy}


@contextlib.contextmanager
def raised_by_all() -> Iterator[None]:
    """What one of several processes raises in the block ends all of them, after all have left the block.

    Raises:
      DataError: in every process, with the reasons of all. A process that has found a bug raises that instead.
    """
    error, reason = None, ""
    try:
        yield
    except Exception as caught:
        error, reason = caught, str(caught) if isinstance(caught, UserError) else repr(caught)
        if jax.process_count() > 1:
            print(f"process {jax.process_index()} stops when the others have ended, too: {reason}", flush=True)
    reasons = [json.loads(line) for line in distributed.gather(json.dumps(reason).encode())]
    if error is not None and (len(reasons) == 1 or not isinstance(error, UserError)):
        raise error
    if any(reasons):
        raise DataError("; ".join(dict.fromkeys(filter(None, reasons))))


def _assess_share(drawings: Drawings, judge: Judge, folder: pathlib.Path) -> collections.Counter[str]:
    """Assesses the drawings of this process that have no verdict: number of failures by kind; see `assess`."""
    folder.mkdir(parents=True, exist_ok=True)
    journal = Journal(folder, jax.process_index())  # first: it locks out another run
    try:
        identity = dict(drawings=drawings.identity, **judge.identity())
        claim(folder, identity, "verdicts", is_empty=not read_verdicts(folder))
        others = max(total_spent(folder) - journal.spent, 0.0)
        judge.start(drawings.header, journal.spent, others, jax.process_count())
        return Run(judge, journal, drawings, set(read_verdicts(folder)), read_failures(folder)).finish()
    finally:
        journal.close()


def verdict_folder(drawings: Drawings, verdicts: str) -> pathlib.Path:
    """The directory of verdicts: the given one, or `FOLDER` in that of the drawings."""
    return storage.path(verdicts) if verdicts else drawings.path / FOLDER


def verdicts_on(drawings: Drawings, verdicts: str) -> dict[int, Verdict]:
    """The verdicts on drawings, by their index.

    Raises:
      DataError: there are none, or they are on other drawings.
    """
    folder = verdict_folder(drawings, verdicts)
    header = read_header(folder, "assess the drawings with python -m unimm_jax.self_enhance assess")
    if header.get("drawings") != drawings.identity:
        raise DataError(f"the verdicts in {folder} are not on the drawings in {drawings.path}")
    return read_verdicts(folder)


class Run:
    """One run of a judge over the drawings of this process.

    Args (constructor):
      judge: started. journal: gets the verdicts. drawings: to assess. done: indices of those that have a verdict.
      failed_before: of those on which the judge failed in earlier runs. They come last, and their failures do not
        count for its patience: there may be many on which it always fails.
    """

    def __init__(self, judge: Judge, journal: Journal, drawings: Drawings, done: set[int], failed_before: set[int]):
        self.judge, self.journal, self.drawings = judge, journal, drawings
        self.done, self.failed_before = done, failed_before
        self.failed: collections.Counter[str] = collections.Counter()
        self._in_a_row, self._written = 0, 0
        size = drawings.header["block"]
        mine = [b for b in drawings.complete() if b % jax.process_count() == jax.process_index()]
        indices = itertools.chain.from_iterable(range(b * size, min((b + 1) * size, len(drawings))) for b in mine)
        self._blocks, self._total = mine, sum(index not in done for index in indices)
        self._progress = Progress(self._total, "verdicts", every=100)
        judge.note_spent = journal.write_spent

    def finish(self) -> collections.Counter[str]:
        """Assesses everything that is left: number of failures by kind.

        Raises:
          DataError: see `assess`.
        """
        pool = concurrent.futures.ThreadPoolExecutor(self.judge.workers)
        running: dict[concurrent.futures.Future[Verdict], Drawing] = {}
        todo, reason = self._todo(), None
        try:
            while True:
                for drawing in itertools.islice(todo, 2 * self.judge.workers - len(running)):
                    running[pool.submit(self._one, drawing)] = drawing
                if not running:
                    break
                ended, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
                for future in sorted(ended, key=lambda future: running[future].index):  # failures in a row are counted
                    self._note(running.pop(future), future)
        except DataError as error:
            reason = error
        finally:
            self.judge.close()
            pool.shutdown(wait=True, cancel_futures=True)
            for future, drawing in running.items():  # what ended meanwhile is not lost
                self._save(drawing, future)
        if reason is not None:
            raise DataError(f"{reason}; {self._written} of {self._total} drawings were assessed in this run; {AGAIN}")
        return self.failed

    def _todo(self) -> Iterator[Drawing]:
        again = []
        for block in self._blocks:
            for drawing in self.drawings.block(block):
                if drawing.index in self.done:
                    continue
                if drawing.index in self.failed_before:
                    again.append(drawing)
                else:
                    yield drawing
        yield from again

    def _one(self, drawing: Drawing) -> Verdict:
        return self.judge.assess(drawing, self.drawings.image(drawing))

    def _note(self, drawing: Drawing, future: concurrent.futures.Future[Verdict]) -> None:
        """Writes what came of a drawing. Raises DataError if the run must stop."""
        try:
            verdict = future.result()
        except JudgeError as error:
            self._fail(drawing, error)
            if drawing.index not in self.failed_before:
                self._in_a_row += 1
                if self._in_a_row == self.judge.patience:
                    raise DataError(
                        f"the judge failed {self._in_a_row} times in a row, the last time: {error}"
                    ) from None
        else:
            self._write(drawing, verdict)
            self._in_a_row = 0
        self._progress.add(1)

    def _save(self, drawing: Drawing, future: concurrent.futures.Future[Verdict]) -> None:
        """Writes what came of a drawing after the run has stopped."""
        error = None if future.cancelled() else future.exception()
        if isinstance(error, JudgeError) and error.kind != STOPPED:
            self._fail(drawing, error)
        elif error is None and not future.cancelled():
            self._write(drawing, future.result())

    def _fail(self, drawing: Drawing, error: JudgeError) -> None:
        self.failed[error.kind] += 1
        self.journal.write_failure(drawing.index, error.kind, str(error), self.judge.spent)

    def _write(self, drawing: Drawing, verdict: Verdict) -> None:
        self.journal.write(drawing.index, verdict, self.judge.spent)
        self._written += 1


def counts_of(verdicts: Mapping[int, Verdict]) -> dict[str, Any]:
    """Numbers of verdicts: all, good ones, bad ones, and by category those that do not fit."""
    good = sum(verdict.good for verdict in verdicts.values())
    wrong = {name: sum(not v.category(name) for v in verdicts.values()) for name in CATEGORIES}
    return {"assessed": len(verdicts), "good": good, "bad": len(verdicts) - good, "wrong": wrong}


def lines_of(summary: Mapping[str, Any], total: int, remedy: str) -> list[str]:
    """The counts of `assess` as lines of text; see `Judge.remedy`."""
    wrong = ", ".join(f"{name} {number}" for name, number in summary["wrong"].items())
    found = f"{summary['good']} good, {summary['bad']} bad (wrong: {wrong})"
    lines = [f"verdicts: {summary['assessed']} of {total} drawings, {found}"]
    if summary["failed"]:
        kinds = ", ".join(f"{kind} {number}" for kind, number in summary["failed"].items())
        lines.append(f"verdicts: {sum(summary['failed'].values())} failures in this run ({kinds})")
    if summary["remaining"]:
        lines.append(f"verdicts: {summary['remaining']} drawings have none; {remedy}")
    if "unused" in summary:
        lines.append(f"verdicts: {summary['unused']} that the judge was given are of no image that is drawn")
    if summary["not_drawn"]:
        lines.append(f"verdicts: {summary['not_drawn']} images are not drawn yet; run self_enhance generate again")
    return lines + ([f"verdicts: {summary['spent']:.4f} dollars spent"] if "spent" in summary else [])
