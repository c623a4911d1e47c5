"""Verdicts from a file, given by people or by a program outside of this project."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from unimm_jax import storage
from unimm_jax.data.sources.files import JsonRows
from unimm_jax.enhancement.drawings import Drawing
from unimm_jax.enhancement.journal import is_verdict
from unimm_jax.enhancement.judges import Judge
from unimm_jax.enhancement.verdicts import Verdict, from_json
from unimm_jax.errors import DataError, JudgeError


class FileJudge(Judge):
    """Lines {"index": of the drawing, "seen": …, "object": …, "count": …, "color": …, "spatial": …}.

    Instead of "index", a line may have the "key" and the "prompt" of the drawing, if there is one image per text. The
    verdicts that `assess` writes have this form, too; its lines of failures are skipped.

    Raises (constructor):
      DataError: the file cannot be read, or a line is not a verdict or names a drawing again.
    """

    remedy = "add their verdicts to the file and run the command again"

    def __init__(self, path: str):
        self.file = storage.path(path)
        self.verdicts: dict[int | tuple[str, str], Verdict] = {}
        rows = JsonRows(self.file)
        for number in range(len(rows)):
            try:
                row = rows[number]
                if isinstance(row, dict) and not is_verdict(row):
                    continue
                name = _name(row)
                if name in self.verdicts:
                    raise DataError(f"drawing {name} has a second verdict")
                self.verdicts[name] = from_json(row)
            except DataError as error:
                raise DataError(f"{self.file}, row {number + 1}: {error}") from None
        self.given = len(self.verdicts)

    @classmethod
    def open(cls, rest: str) -> "FileJudge":
        """See `Judge.open`; `rest` is the path."""
        if not rest:
            raise DataError("the judge file needs a path (file:PATH)")
        return cls(rest)

    def identity(self) -> dict[str, Any]:
        """See `Judge.identity`. Lines can be added to a file, so its contents are not part of it."""
        return {"judge": "file", "path": str(self.file if storage.is_remote(self.file) else self.file.resolve())}

    def start(self, header: Mapping[str, Any], spent: float, others: float, processes: int) -> None:
        """See `Judge.start`."""
        super().start(header, spent, others, processes)
        if header["settings"]["samples"] > 1 and not all(isinstance(name, int) for name in self.verdicts):
            raise DataError(
                f"{self.file} names drawings by key and prompt, and there are several of each; give an index"
            )

    def assess(self, drawing: Drawing, image: np.ndarray) -> Verdict:
        """See `Judge.assess`."""
        names = (drawing.index, (drawing.key, drawing.prompt))
        found = next((self.verdicts[name] for name in names if name in self.verdicts), None)
        if found is None:
            raise JudgeError("no verdict in the file", f"drawing {drawing.index}")
        return found


def _name(row: dict[str, Any]) -> int | tuple[str, str]:
    index, key, prompt = row.get("index"), row.get("key"), row.get("prompt")
    if isinstance(index, int) and not isinstance(index, bool):
        return index
    if isinstance(key, str) and isinstance(prompt, str):
        return key, prompt
    raise DataError("it has neither an index nor a key and a prompt")
