"""Assesses drawings by a judge. Every verdict is on disk as soon as it is there; a run that ends early is resumed."""

import collections
import concurrent.futures
import itertools
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from unimm_jax import distributed, storage
from unimm_jax.enhancement.drawings import Drawing, Drawings
from unimm_jax.enhancement.files import claim, read_header
from unimm_jax.enhancement.journal import Journal, read_verdicts, total_spent
from unimm_jax.enhancement.judges import STOPPED, Judge, open_judge
from unimm_jax.enhancement.verdicts import CATEGORIES, Verdict
from unimm_jax.errors import DataError, JudgeError
from unimm_jax.progress import Progress

FOLDER = "verdicts"  # in the directory of the drawings, where no other is given
AGAIN = "all verdicts so far are saved; run the command again to continue"


def assess(drawings: str, judge: str, output: str = "") -> dict[str, Any]:
    """Assesses the drawings that have no verdict yet, and returns the counts that it prints.

    Blocks are split over the processes as in `drawings.draw`. Drawings on which the judge fails are counted, and the
    next run tries them again.

    Args:
      drawings: directory that `draw` wrote; blocks that are not complete are left out.
      judge: see `judges.open_judge`. output: directory for the verdicts; `FOLDER` in that of the drawings if empty.

    Raises:
      DataError: no drawings, a wrong judge, verdicts of another judge in `output`, too many failures in a row, or no
        image can be assessed (a refused key, the limit of the cost). All verdicts so far are on disk.
    """
    found = Drawings(storage.path(drawings))
    folder = verdict_folder(found, output)
    who = open_judge(judge)
    identity = dict(drawings=found.identity, **who.identity())
    folder.mkdir(parents=True, exist_ok=True)
    journal = Journal(folder, jax.process_index())  # first: it locks out another run
    try:
        claim(folder, identity, "verdicts", is_empty=not read_verdicts(folder))
        others = max(total_spent(folder) - journal.spent, 0.0)
        who.start(found.header, journal.spent, others, jax.process_count())
        done = set(read_verdicts(folder))
        failed = Run(who, journal, found, done).finish()
    finally:
        journal.close()
    counts = distributed.gather(json.dumps(failed).encode())  # when all processes have ended
    failed = sum((collections.Counter(json.loads(line)) for line in counts), collections.Counter())
    verdicts, spent = read_verdicts(folder), total_spent(folder)
    size = found.header["block"]
    drawn = sum(min((block + 1) * size, len(found)) - block * size for block in found.complete())
    summary = counts_of(verdicts) | {"remaining": drawn - len(verdicts), "not_drawn": len(found) - drawn}
    summary |= {"failed": dict(sorted(failed.items()))}
    summary |= {"spent": round(spent, 4)} if spent else {}
    if not verdicts:
        kinds = ", ".join(f"{number} × {kind}" for kind, number in failed.items()) or "no block is complete"
        raise DataError(f"none of the {len(found)} drawings in {drawings} was assessed ({kinds})")
    if jax.process_index() == 0:
        storage.write_whole(folder / "summary.json", json.dumps(summary, indent=1).encode())
        print("\n".join(lines_of(summary, len(found))), flush=True)
    return summary


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
    """

    def __init__(self, judge: Judge, journal: Journal, drawings: Drawings, done: set[int]):
        self.judge, self.journal, self.drawings, self.done = judge, journal, drawings, done
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
        for block in self._blocks:
            yield from (drawing for drawing in self.drawings.block(block) if drawing.index not in self.done)

    def _one(self, drawing: Drawing) -> Verdict:
        return self.judge.assess(drawing, self.drawings.image(drawing))

    def _note(self, drawing: Drawing, future: concurrent.futures.Future[Verdict]) -> None:
        """Writes what came of a drawing. Raises DataError if the run must stop."""
        try:
            verdict = future.result()
        except JudgeError as error:
            self._fail(drawing, error)
            self._in_a_row += 1
            if self._in_a_row == self.judge.patience:
                raise DataError(f"the judge failed {self._in_a_row} times in a row, the last time: {error}") from None
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


def lines_of(summary: Mapping[str, Any], total: int) -> list[str]:
    """The counts of `assess` as lines of text."""
    wrong = ", ".join(f"{name} {number}" for name, number in summary["wrong"].items())
    found = f"{summary['good']} good, {summary['bad']} bad (wrong: {wrong})"
    lines = [f"verdicts: {summary['assessed']} of {total} drawings, {found}"]
    if summary["failed"]:
        kinds = ", ".join(f"{kind} {number}" for kind, number in summary["failed"].items())
        lines.append(f"verdicts: {sum(summary['failed'].values())} failures in this run ({kinds})")
    if summary["remaining"]:
        lines.append(f"verdicts: {summary['remaining']} drawings have none; run the command again to try them")
    if summary["not_drawn"]:
        lines.append(f"verdicts: {summary['not_drawn']} images are not drawn yet; run self_enhance generate again")
    return lines + ([f"verdicts: {summary['spent']:.4f} dollars spent"] if "spent" in summary else [])
