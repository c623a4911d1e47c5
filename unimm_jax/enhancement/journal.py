"""Verdicts on disk: one journal per process, with a line per drawing, written as soon as its verdict is there."""

import fcntl
import json
import pathlib
from collections.abc import Iterator
from typing import Any

from unimm_jax.enhancement.verdicts import Verdict, from_json
from unimm_jax.errors import DataError


class Journal:
    """Appends verdicts to `verdicts-PROCESS.jsonl`. A half-written last line, of a run that was killed, is removed.

    Attributes:
      spent: dollars, as the last line says.

    Args (constructor):
      folder: directory of all journals. process: index of this process.

    Raises (constructor):
      DataError: a line is damaged, or another run writes the journal.
    """

    def __init__(self, folder: pathlib.Path, process: int):
        self.file = folder / f"verdicts-{process}.jsonl"
        self._stream = self.file.open("a+b")
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._stream.close()
            raise DataError(f"another run writes {self.file}; wait for its end or give another --output") from None
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

    def _append(self, row: dict[str, Any]) -> None:
        self._stream.write(json.dumps(row).encode() + b"\n")
        self._stream.flush()

    def close(self) -> None:
        """Closes the file."""
        self._stream.close()


def read_verdicts(folder: pathlib.Path) -> dict[int, Verdict]:
    """The verdicts in all journals of a directory, by index of the drawing.

    Raises:
      DataError: a line is damaged, or a drawing has two verdicts.
    """
    found: dict[int, Verdict] = {}
    for file in sorted(folder.glob("verdicts-*.jsonl")):
        for number, row in enumerate(_rows(file), 1):
            if "failed" in row:
                continue
            try:
                index, verdict = int(row["index"]), from_json(row)
            except (DataError, KeyError, TypeError, ValueError) as error:
                raise DataError(f"{file}, line {number}, is not a verdict ({error}); remove the line") from None
            if index in found:
                raise DataError(f"drawing {index} has two verdicts in {folder}; remove one of the lines")
            found[index] = verdict
    return found


def total_spent(folder: pathlib.Path) -> float:
    """Dollars that all journals of a directory note.

    Raises:
      DataError: a line is damaged.
    """
    return sum(_spent(file) for file in folder.glob("verdicts-*.jsonl"))


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
    with file.open("rb") as stream:
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
