"""Parquet files with encoded images and texts, read by row group."""

import itertools
import logging
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from unimm_jax import storage
from unimm_jax.data.outlines import Record
from unimm_jax.data.recent import Recent
from unimm_jax.data.sources.base import SPLITS, fingerprint_files
from unimm_jax.data.sources.files import text_of
from unimm_jax.data.sources.shards import captions_of, decode_text, find_shards, locate, map_files
from unimm_jax.errors import DataError, InvalidRecordError, StorageError

# names of columns; the first that a file has counts
IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp")
CAPTION_COLUMNS = ("text", "caption", "captions", "txt")
SOURCE_COLUMNS = ("original_image", "input_image", "source_image", "source_img")  # before an edit
TARGET_COLUMNS = ("edited_image", "target_image", "target_img")
INSTRUCTION_COLUMNS = ("edit_prompt", "instruction", "edit_instruction")
TEXT_COLUMNS = ("text",)  # of files without images
URL_COLUMNS = ("url", "URL", "image_url")
URL_CAPTION_COLUMNS = ("caption", "TEXT", "captions", "txt")  # beside a URL: the input or the log of img2dataset

CACHE_BYTES = 2**26  # of row groups, and of footers
_SPLIT = re.compile(r"(train|test|validation)(?![A-Za-z])")  # at the start of the name of a file
GROUP_BYTES = 2**21  # a warning suggests row groups up to this size


class Layout(NamedTuple):
    """What the columns of a file are.

    Attributes:
      kind: field of `Record` that the text is: "captions", "instruction" or "text".
      text: column of the text. images: columns of the images.
      parts: what is read of the columns: of an image with path and bytes, only the bytes.
    """

    kind: str
    text: str
    images: tuple[str, ...]
    parts: tuple[str, ...]


class _File(NamedTuple):
    """What the footer of a file says: layout, rows of each row group, and bytes read of the largest row group.

    Attributes:
      size: of the file in bytes.
    """

    layout: Layout
    rows: list[int]
    largest: int
    size: int


class ParquetSource:
    """Rows with images and captions, with two images and the instruction of an edit, or with text only.

    Images are encoded bytes, also as {"bytes", "path"} (Hugging Face); captions are a text or a list of texts. Which
    columns are read is decided by their names; see the constants of this module. A record is read with its row group,
    and the row groups that were last used stay in memory.

    Args (constructor):
      path: a file, a directory with .parquet files, or a pattern (see `find_shards`), for example train-*.parquet.
      split: "train" or "test"; of a directory whose files name their splits (see `find_split`), its files are read.

    Raises (constructor):
      DataError: there are no files or rows, or a file is not Parquet or has no such columns.
    """

    splits: tuple[str, ...] = ("train",)
    evaluator = "captions"

    def __init__(self, path: str, split: str = "train"):
        self.name = path
        self.root, self.files = find_shards(path, ".parquet")
        if storage.kind(storage.path(path)) == "directory" and (found_split := find_split(self.files, split)):
            self.splits, self.files = SPLITS, found_split
        found = map_files(_read_footer, self.files)
        self.layouts, self.sizes = [file.layout for file in found], [file.size for file in found]
        self.starts = np.cumsum([0, *(rows for file in found for rows in file.rows)], dtype=np.int64).tolist()
        if not len(self):
            raise DataError(f"{path} has no rows in {len(found)} Parquet files")
        # int64 [G, 3]: file, row group in it, row of the file that it starts with
        ends = [list(itertools.accumulate(file.rows)) for file in found]
        groups = [(f, g, end - found[f].rows[g]) for f, file in enumerate(ends) for g, end in enumerate(file)]
        self.groups = np.array(groups, np.int64)
        self.labels = [file.relative_to(self.root).as_posix() for file in self.files]
        self._tables, self._footers = Recent(CACHE_BYTES), Recent(CACHE_BYTES)
        largest = max(range(len(found)), key=lambda f: found[f].largest)
        if found[largest].largest > GROUP_BYTES:
            size = max(1, max(found[largest].rows) * GROUP_BYTES // found[largest].largest)
            logging.warning(
                "%s has row groups of up to %.1f MB, and a row is read with its row group; for faster reading in any "
                "order, write the files again with pyarrow.parquet.write_table(table, file, row_group_size=%d)",
                self.files[largest],
                found[largest].largest / 1e6,
                size,
            )

    @classmethod
    def open(cls, rest: str, split: str) -> "ParquetSource":
        """Opens files. Those of one split if a directory has the splits "train" and "test" itself.

        Raises:
          DataError: see the class.
        """
        return cls(rest, split)

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> Record:
        group, row = locate(self.starts, index)
        layout = self.layouts[self.groups[group, 0]]
        try:
            table = self._tables.get(group, lambda: self._read(group))
            values = {name: table.column(name)[row].as_py() for name in (layout.text, *layout.images)}
        except UnicodeDecodeError as error:
            raise InvalidRecordError(f"its {layout.text} is not UTF-8 text ({error.reason})") from None
        except StorageError:
            raise
        except Exception as error:  # pyarrow raises many types for damaged pages
            raise InvalidRecordError(f"its row group cannot be read: {_first_line(error)}") from error
        text = values[layout.text]
        if text is None:
            raise InvalidRecordError(f"its {layout.text} is null")
        key = self.key(index)
        if layout.kind == "captions":
            captions = captions_of(text, layout.text)
            return Record(key, [_image_bytes(values[name], name) for name in layout.images], captions=captions)
        text = text_of({layout.text: _as_string(text, layout.text)}, (layout.text,))
        images = [_image_bytes(values[name], name) for name in layout.images]
        return Record(key, images, instruction=text) if images else Record(key, text=text)

    def _read(self, group: int) -> tuple[Any, int]:
        """What is needed of a row group, and its bytes in memory."""
        import pyarrow.parquet

        number, inside, _ = self.groups[group].tolist()
        file = self.files[number]

        def footer() -> tuple[Any, int]:
            metadata = pyarrow.parquet.read_metadata(_opened(file, self.sizes[number]))
            return metadata, metadata.serialized_size

        metadata = self._footers.get(number, footer)
        is_remote = storage.is_remote(file)  # then, pyarrow joins reads of columns that are close to each other
        source = _opened(file, self.sizes[number])
        with pyarrow.parquet.ParquetFile(source, metadata=metadata, pre_buffer=is_remote) as opened:
            table = opened.read_row_group(inside, columns=list(self.layouts[number].parts), use_threads=False)
        return table, table.nbytes

    def key(self, index: int) -> str:
        """See `Source.key`: the path of the file below the directory of all files, and the row in it (from 1)."""
        group, row = locate(self.starts, index)
        file, _, start = self.groups[group].tolist()
        return f"{self.labels[file]}/{start + row + 1}"

    def fingerprint(self) -> str:
        """See `Source.fingerprint`."""
        return fingerprint_files(self.root, self.files)


def find_split(files: Sequence[pathlib.Path], split: str) -> list[pathlib.Path]:
    """The files of a split, by the first word of their names: "train", "test" or "validation" (Hugging Face Hub).

    Names without such a word count as "train". "validation" is the split "test" where no file is named "test"; beside
    such files it is not used.

    Returns:
      the files, or an empty list if there are not both splits.
    """
    named: dict[str, list[pathlib.Path]] = {"train": [], "test": [], "validation": []}
    for file in files:
        match = _SPLIT.match(file.name)
        named[match[1] if match else "train"].append(file)
    test = named["test"] or named["validation"]
    if not named["train"] or not test:
        return []
    return named["train"] if split == "train" else test


def _opened(file: pathlib.Path, size: int) -> Any:
    """What pyarrow reads."""
    return storage.RangeFile(file, size) if storage.is_remote(file) else file


def _read_footer(file: pathlib.Path) -> _File:
    """Reads what is needed of the footer of a file.

    Raises:
      DataError: it is not a Parquet file, or its columns are not those of a layout.
    """
    import pyarrow.parquet

    try:
        size = storage.version(file)[0]
        metadata = pyarrow.parquet.read_metadata(_opened(file, size))
        schema = metadata.schema.to_arrow_schema()
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror or _first_line(error)})") from None
    except pyarrow.ArrowException as error:
        raise DataError(f"{file} is not a whole Parquet file ({_first_line(error)})") from None
    layout = find_layout(schema, file)
    rows, largest = [], 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        columns = [group.column(c) for c in range(group.num_columns)]
        used = [c for c in columns if any(f"{c.path_in_schema}.".startswith(f"{part}.") for part in layout.parts)]
        largest = max(largest, sum(c.total_compressed_size for c in used))
        rows.append(group.num_rows)
    return _File(layout, rows, largest, size)


def find_layout(schema: Any, file: pathlib.Path) -> Layout:
    """The layout of a file by the names and types of its columns.

    Args:
      schema: pyarrow schema.
      file: for messages.

    Raises:
      DataError: there is no such layout; the message names the columns.
    """
    names = set(schema.names)

    def first(candidates: Sequence[str]) -> str | None:
        return next((name for name in candidates if name in names), None)

    images: tuple[str, ...]
    image, url = first(IMAGE_COLUMNS), first(URL_COLUMNS)
    source, target, instruction = first(SOURCE_COLUMNS), first(TARGET_COLUMNS), first(INSTRUCTION_COLUMNS)
    if source and target and instruction:
        kind, text, images = "instruction", instruction, (source, target)
    elif image and (caption := first(CAPTION_COLUMNS)):
        kind, text, images = "captions", caption, (image,)
    elif url and not image and first(URL_CAPTION_COLUMNS):
        raise DataError(
            f"{file} has the column {url} and no image bytes (the input or the log of img2dataset), and nothing is "
            "downloaded; use the tars (webdataset:), image files (folder:) or Parquet files that img2dataset writes"
        )
    elif not image and not source and not target and (only := first(TEXT_COLUMNS)):
        kind, text, images = "text", only, ()
    else:
        raise DataError(
            f"{file} needs an image ({', '.join(IMAGE_COLUMNS)}) and a caption ({', '.join(CAPTION_COLUMNS)}), or "
            f"images before and after an edit ({', '.join(SOURCE_COLUMNS)}; {', '.join(TARGET_COLUMNS)}) and an "
            f"instruction ({', '.join(INSTRUCTION_COLUMNS)}), or {' or '.join(TEXT_COLUMNS)}; it has the columns "
            f"{', '.join(sorted(names))[:200]}"
        )
    parts = [_image_part(name, schema.field(name).type, file) for name in images]
    _check_text(text, schema.field(text).type, kind == "captions", file)
    return Layout(kind, text, images, (*parts, text))


def _image_part(name: str, kind: Any, file: pathlib.Path) -> str:
    """What is read of an image column of a type: it, or its field "bytes"."""
    import pyarrow.types as types

    def is_binary(kind: Any) -> bool:
        return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)

    if is_binary(kind):
        return name
    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and is_binary(kind.field("bytes").type):
        return f"{name}.bytes"
    raise DataError(f"{file}: the column {name} has the type {str(kind)[:80]}; it must be encoded bytes of images")


def _check_text(name: str, kind: Any, may_be_list: bool, file: pathlib.Path) -> None:
    """Raises DataError if a column does not contain text, or lists of texts where that is allowed."""
    import pyarrow.types as types

    value = kind
    if types.is_list(kind) or types.is_large_list(kind):
        value = kind.value_type if may_be_list else None
    if value is not None and types.is_dictionary(value):
        value = value.value_type
    texts = ("is_string", "is_large_string", "is_string_view", "is_binary", "is_large_binary")
    if value is None or not any(getattr(types, check)(value) for check in texts):
        wanted = "text or lists of texts" if may_be_list else "text"
        raise DataError(f"{file}: the column {name} has the type {str(kind)[:80]}; it must be {wanted}")


def _image_bytes(value: Any, name: str) -> bytes:
    """The encoded image in a value of an image column."""
    data = value.get("bytes") if isinstance(value, dict) else value
    if data is None:
        raise InvalidRecordError(f"its {name} is {'null' if value is None else 'a path without bytes'}")
    if not data:
        raise InvalidRecordError(f"its {name} is empty")
    return data


def _as_string(value: Any, name: str) -> Any:
    return decode_text(value, name) if isinstance(value, bytes) else value


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
