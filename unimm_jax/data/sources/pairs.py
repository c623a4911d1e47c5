"""Images before and after an edit, with the instruction, in a directory (InstructPix2Pix)."""

from typing import Any, Self

from unimm_jax import storage
from unimm_jax.data.sources.files import RowSource, split_options, text_of
from unimm_jax.errors import InvalidRecordError

ROWS = "edits.jsonl"


class EditSource(RowSource):
    """A directory with `edits.jsonl`: rows {"source": path, "target": path, "instruction": text}, paths below it."""

    evaluator = ""
    fields = ("source", "target", "instruction")

    @classmethod
    def open(cls, rest: str, split: str) -> Self:
        """Opens a directory, or a file with such rows. It has no test split (see `open_source`).

        Raises:
          DataError: see `RowSource`.
        """
        del split
        path, options = split_options(rest, cls.options)
        is_directory = storage.kind(storage.path(path)) == "directory"
        return cls(f"{path.rstrip('/')}/{ROWS}" if is_directory else path, **options)

    def parse(self, row: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """See `RowSource.parse`."""
        if missing := [name for name in ("source", "target") if row.get(name) is None]:
            raise InvalidRecordError(f"it has no {' and no '.join(missing)}")
        return [row["source"], row["target"]], {"instruction": text_of(row, ("instruction",))}
