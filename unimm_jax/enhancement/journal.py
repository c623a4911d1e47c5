"""Verdicts on disk: one journal per process, with a line per drawing, written as soon as its verdict is there.

Failures, and amounts that were paid for nothing, have lines, too.

A journal on an object store is written locally. It is copied every few seconds and when it is closed.
"""

import fcntl
import io
import json
import pathlib
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

from unimm_jax import storage
from unimm_jax.enhancement.verdicts import Verdict, from_json
from unimm_jax.errors import DataError

COPY_SECONDS = 10.0  # between two copies to an object store; a process that is killed loses the verdicts since the last


class Journal:
    """Appends verdicts to `verdicts-PROCESS.jsonl`. A half-written last line, of a run that was killed, is removed.

    Several threads may write.

    Attributes:
      spent: dollars, as the lines say.

    Args (constructor):
      folder: directory of all journals. process: index of this process.

    Raises (constructor):
      DataError: a line is damaged, or another run writes the journal.
    """

    def __init__(self, folder: pathlib.Path, process: int):
        self.target = folder / f"verdicts-{process}.jsonl"
        self._before, self._lock = self._version(), threading.Lock()
        self._spool = storage.Spool(folder, (self.target.name,))
        self.file = self._spool.folder / self.target.name
        self._copied = time.monotonic()
        self._stream = self.file.open("a+b")
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._stream.close()
            raise self._taken() from None
        except OSError:  # a file system without locks
            pass
        self._stream.truncate(_whole(self.file))
        self.spent = _spent(self.file)

    def write(self, index: int, verdict: Verdict, spent: float) -> None:
        """Appends the verdict on drawing `index`, with the dollars so far."""
        self._append({"index": index, **verdict.to_json()} | ({"spent": round(spent, 6)} if spent else {}))

    def write_failure(self, index: int, kind: str, details: str, spent: float) -> None:
        """Appends a failure, which the next run tries again."""
        row = {"index": index, "failed": kind, "details": details}
        self._append(row | ({"spent": round(spent, 6)} if spent else {}))

    def write_spent(self, spent: float) -> None:
        """Appends the dollars so far, after an attempt that was paid and gave no verdict."""
        self._append({"spent": round(spent, 6)})

    def _append(self, row: dict[str, Any]) -> None:
        with self._lock:
            self._stream.write(json.dumps(row).encode() + b"\n")
            self._stream.flush()
            if time.monotonic() - self._copied > COPY_SECONDS:
                self._copy()

    def _version(self) -> tuple[int, str] | None:
        """What changes when the journal on an object store is written; None for one that is missing or local."""
        remote = storage.is_remote(self.target)
        return storage.versions(self.target.parent, [self.target])[0] if remote else None

    def _copy(self) -> None:
        """Copies the journal to its object store; see `Spool`."""
        if self._version() != self._before:  # stores have no locks
            raise self._taken()
        self._spool.flush()
        self._before, self._copied = self._version(), time.monotonic()

    def _taken(self) -> DataError:
        return DataError(f"another run writes {self.target}; wait for its end or give another --output")

    def close(self) -> None:
        """Closes the file.

        Raises:
          DataError: another run has written the journal on an object store meanwhile.
        """
        self._stream.close()
        self._copy()
        self._spool.close()


def read_verdicts(folder: pathlib.Path) -> dict[int, Verdict]:
    """The verdicts in all journals of a directory, by index of the drawing.

    Raises:
      DataError: a line is damaged, or a drawing has two verdicts.
    """
    found: dict[int, Verdict] = {}
    for file in _journals(folder):
        for number, row in enumerate(_rows(file), 1):
            if not is_verdict(row):
                continue
            try:
                index, verdict = int(row["index"]), from_json(row)
            except (DataError, KeyError, TypeError, ValueError) as error:
                raise DataError(f"{file}, line {number}, is not a verdict ({error}); remove the line") from None
            if index in found:
                raise DataError(f"drawing {index} has two verdicts in {folder}; remove one of the lines")
            found[index] = verdict
    return found


def read_failures(folder: pathlib.Path) -> set[int]:
    """Indices of the drawings that have a failure in a journal of a directory, with or without a later verdict.

    Raises:
      DataError: a line is damaged.
    """
    return {row["index"] for file in _journals(folder) for row in _rows(file) if "failed" in row and "index" in row}


def is_verdict(row: dict[str, Any]) -> bool:
    """Whether a line of a journal is a verdict: neither a failure nor an amount alone."""
    return "failed" not in row and row.keys() != {"spent"}


def total_spent(folder: pathlib.Path) -> float:
    """Dollars that all journals of a directory note.

    Raises:
      DataError: a line is damaged.
    """
    return sum(_spent(file) for file in _journals(folder))


def _journals(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(folder / name for name in storage.children(folder) if re.fullmatch(r"verdicts-.*\.jsonl", name))


def _spent(file: pathlib.Path) -> float:
    return max((float(row.get("spent", 0.0)) for row in _rows(file)), default=0.0)


def _whole(file: pathlib.Path) -> int:
    """Bytes up to the end of the last whole line."""
    data = file.read_bytes()
    end = data.rfind(b"\n") + 1
    start = data.rfind(b"\n", 0, max(end - 1, 0)) + 1
    try:
        json.loads(data[start:end] or b"{}")
    except ValueError:
        return start
    return end


def _rows(file: pathlib.Path) -> Iterator[dict[str, Any]]:
    """The lines of a journal, without a damaged last one: another process may be writing it."""
    with io.BytesIO(storage.read(file)) as stream:
        for number, line in enumerate(stream, 1):
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
            except ValueError:
                if not stream.readline():
                    return
                raise DataError(f"{file}, line {number}, is damaged; remove the line") from None
            if not isinstance(row, dict):
                raise DataError(f"{file}, line {number}, is not an object; remove the line")
            yield row
