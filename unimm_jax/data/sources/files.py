"""What sources of rows and image files share: safe paths, JSON rows by index, and messages that name the row."""

import io
import json
import logging
import pathlib
import re
import zipfile
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, Self

import numpy as np

from unimm_jax import storage
from unimm_jax.data.outlines import Record
from unimm_jax.data.sources.base import HASHED_BYTES, HASHED_FILES, fingerprint_files
from unimm_jax.errors import DataError, InvalidRecordError, StorageError

CHUNK = 2**24  # bytes read at a time while indexing lines
COPIED_BYTES = 2**30  # of files of rows on an object store, larger ones are not copied but read row by row
MAX_IMAGE_BYTES = 200_000_000
MAX_PATH = 4096  # characters
PLACEHOLDER = "<image>"  # of an image in a text
_IMAGE = re.compile(rf"(?:\r?\n)?{PLACEHOLDER}(?:\r?\n)?")
FINGERPRINTED_ROWS = 50_000  # of files with more rows, only the images of about `HASHED_FILES` rows are fingerprinted


def split_options(rest: str, names: Sequence[str]) -> tuple[str, dict[str, str]]:
    """Splits "PATH,NAME=VALUE,…" into the path and the options. The path and the values may contain commas.

    Args:
      rest: a description of a source without its format.
      names: the options that the format has.

    Raises:
      DataError: there is no path, or an option is unknown, repeated or empty.
    """
    path, *items = rest.split(",")
    options: dict[str, str] = {}
    name = ""
    for item in items:
        found, is_option, value = item.partition("=")
        if not is_option:  # what follows a comma of the path or of a value
            if name:
                options[name] += f",{item}"
            else:
                path += f",{item}"
            continue
        name = found
        if name not in names:
            raise DataError(f"data source {rest!r} has no option {name!r}; it has {', '.join(names) or 'none'}")
        if name in options or not value:
            raise DataError(f"data source {rest!r} needs one value for the option {name}")
        options[name] = value
    if not path:
        raise DataError(f"data source {rest!r} names no file (FORMAT:PATH)")
    return path, options


def image_path(root: pathlib.Path, name: Any) -> pathlib.Path:
    """The path of an image file below `root`, which may not exist.

    Raises:
      InvalidRecordError: `name` is not a relative path below `root`.
    """
    if not isinstance(name, str) or not name:
        raise InvalidRecordError(f"its image is {show(name)}; it must be a path")
    if "://" in name:
        raise InvalidRecordError(f"its image is a URL, and nothing is downloaded: {show(name)}")
    if len(as_text(name, "image")) > MAX_PATH:
        raise InvalidRecordError(f"its image is not a path: it has {len(name)} characters")
    if name.startswith("/") or ".." in pathlib.PurePosixPath(name).parts or "\0" in name or "\\" in name:
        raise InvalidRecordError(f"its image {name!r} is not a path inside the data directory")
    return root / name


def read_image(root: pathlib.Path, name: Any) -> bytes:
    """The bytes of an image file below `root`.

    Raises:
      InvalidRecordError: `name` is not a relative path below `root`, or the file cannot be read.
    """
    file = image_path(root, name)
    try:
        if storage.is_remote(file):  # one request
            data = storage.read(file, 0, MAX_IMAGE_BYTES + 1)
            if len(data) > MAX_IMAGE_BYTES:
                raise InvalidRecordError(f"its image {name} has more than {MAX_IMAGE_BYTES} bytes")
            return data
        if not file.is_file() and file.exists():
            raise InvalidRecordError(f"its image {name} is not a file")
        if file.stat().st_size > MAX_IMAGE_BYTES:
            raise InvalidRecordError(f"its image {name} has more than {MAX_IMAGE_BYTES} bytes")
        return file.read_bytes()
    except FileNotFoundError:
        raise InvalidRecordError(f"its image {name} does not exist") from None
    except OSError as error:
        raise InvalidRecordError(f"its image {name} cannot be read ({error.strerror})") from error


class JsonRows:
    """The objects of a JSON Lines file, or of a JSON file with one list, by index.

    Only the offsets of lines are in memory; a JSON list is read whole. A file on an object store is read from a local
    copy; one above `COPIED_BYTES` by a request for each row, and its offsets are kept in the cache.

    Raises (constructor):
      DataError: the file is missing, is not UTF-8 JSON, or has no rows.
    """

    def __init__(self, file: pathlib.Path):
        self.file = file
        self._list: list[Any] | None = None
        try:
            is_large = storage.is_remote(file) and storage.version(file)[0] > COPIED_BYTES
            self._copy = file if is_large else storage.local_file(file)
            first = self._read(0, 64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
            if first == b"[":
                self._list = json.loads(self._read())
            else:
                self._starts = _kept_line_starts(file) if is_large else _line_starts(self._copy)
        except OSError as error:
            raise DataError(f"{file} cannot be read ({error.strerror})") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file} is not a JSON list or JSON Lines file ({error})") from None
        if not len(self):
            raise DataError(f"{file} has no rows")

    def __len__(self) -> int:
        return len(self._starts) - 1 if self._list is None else len(self._list)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A row.

        Raises:
          InvalidRecordError: it is not a JSON object; the message names the row (from 1).
        """
        if self._list is not None:
            row = self._list[index]
        else:
            start, end = int(self._starts[index]), int(self._starts[index + 1])
            try:
                row = json.loads(self._read(start, end - start).decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                raise InvalidRecordError(f"row {index + 1} is not UTF-8 text ({error.reason})") from None
            except (ValueError, RecursionError) as error:
                raise InvalidRecordError(f"row {index + 1} is not JSON ({error})") from None
            except OSError as error:
                if error.errno in storage.DISK_ERRORS:  # of the local copy, not of the row
                    raise
                raise InvalidRecordError(f"row {index + 1} cannot be read ({error.strerror})") from error
        if not isinstance(row, dict):
            raise InvalidRecordError(f"row {index + 1} is not a JSON object")
        return row

    def is_object(self, fields: Sequence[str]) -> bool:
        """Whether the file is one JSON object that is not a row: it has none of `fields`, or several lines."""
        if self._list is not None:
            return False
        try:
            row = self[0]
        except InvalidRecordError:  # the first line is not an object; are all lines together?
            if int(self._starts[-1]) > HASHED_BYTES:
                return False
        else:
            return len(self) == 1 and not set(fields) & set(row)
        try:
            return isinstance(json.loads(self._read()), dict)
        except (OSError, ValueError, RecursionError):
            return False

    def _read(self, start: int = 0, size: int | None = None) -> bytes:
        try:
            return storage.read(self._copy, start, size)
        except FileNotFoundError:
            if self._copy == self.file:
                raise
            self._copy = storage.local_file(self.file)  # the bound of the cache has removed it
            return storage.read(self._copy, start, size)


def _kept_line_starts(file: pathlib.Path) -> np.ndarray:
    """`_line_starts`, computed once for each version of a file."""
    kept = storage.cache_place(file, storage.version(file), ".lines.npz")
    found = load_arrays(kept)
    if found is not None and "starts" in found:
        return found["starts"]
    starts = _line_starts(file)
    save_arrays(kept, starts=starts)
    return starts


def load_arrays(file: pathlib.Path) -> dict[str, np.ndarray] | None:
    """The arrays of a .npz file, or None if it is missing or damaged."""
    try:
        with np.load(io.BytesIO(storage.read(file)), allow_pickle=False) as data:
            return dict(data)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, AttributeError, TypeError):
        return None


def save_arrays(file: pathlib.Path, **arrays: Any) -> bool:
    """Writes a .npz file, if possible; other processes see all of it or nothing. Whether it was possible."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    try:
        if not storage.is_remote(file):
            file.parent.mkdir(parents=True, exist_ok=True)
        storage.write_whole(file, buffer.getvalue())
    except (OSError, StorageError) as error:
        logging.debug("%s is not written (%s)", file, error)
        return False
    return True


def _line_starts(file: pathlib.Path) -> np.ndarray:
    """Offsets of the lines that are not blank, int64, and the end of the file."""
    starts, at, open_at, is_blank = [], 0, 0, True
    while chunk := storage.read(file, at, CHUNK):
        begin = 0
        while (end := chunk.find(b"\n", begin)) >= 0:
            is_blank = is_blank and not chunk[begin:end].strip()
            if not is_blank:
                starts.append(open_at)
            open_at, begin, is_blank = at + end + 1, end + 1, True
        is_blank = is_blank and not chunk[begin:].strip()
        at += len(chunk)
    if not is_blank:
        starts.append(open_at)
    return np.array([*starts, at], np.int64)


def show(value: Any) -> str:
    """A value of a row for a message, in at most about 80 characters."""
    if isinstance(value, str):
        return repr(value[:80]) + ("…" if len(value) > 80 else "")
    return type(value).__name__ if isinstance(value, list | dict) else str(value)[:80]


def as_text(value: Any, name: str) -> str:
    """A value as it is.

    Raises:
      InvalidRecordError: it is not a string, or not one that UTF-8 can encode; the message contains `name`.
    """
    if not isinstance(value, str):
        raise InvalidRecordError(f"its {name} is {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidRecordError(f"its {name} is not Unicode text ({error.reason})") from None
    return value


def text_of(row: dict[str, Any], names: Sequence[str]) -> str:
    """The first non-empty text among some fields of a row.

    Raises:
      InvalidRecordError: there is none, or it is not a string.
    """
    for name in names:
        value = row.get(name)
        if value is not None and (text := as_text(value, name).strip()):
            return text
    raise InvalidRecordError(f"it has no {' or '.join(names)}")


def place_images(parts: Iterable[tuple[bool, Any]], images: list[Any]) -> list[str | int]:
    """The content of a `Message` or a document: texts that are not blank, and the numbers of the images.

    Args:
      parts: whether a part is an image, and its text or image.
      images: of the record so far; those of the parts are appended.
    """
    content: list[str | int] = []
    for is_image, value in parts:
        if is_image:
            content.append(len(images))
            images.append(value)
        elif value.strip():
            content.append(value)
    return content


def split_placeholders(text: str) -> list[tuple[bool, Any]]:
    """The parts of a text for `place_images`. Each `<image>` is an image, None; line breaks beside it are dropped."""
    parts: list[tuple[bool, Any]] = []
    for number, between in enumerate(_IMAGE.split(text)):
        parts += [(True, None)] * bool(number) + [(False, between)]
    return parts


class Rows(Protocol):
    """Rows by index; reading one raises `InvalidRecordError` if it is unusable."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


class RowSource:
    """A file whose rows are records, and a directory with their images. A subclass says in `parse` what a row has.

    Attributes:
      options: options of the description. fields: a row has one of these fields.
      splits, evaluator: see `Source`.

    Args (constructor):
      path: the file.
      images: directory that the paths of images are relative to; by default that of the file.

    Raises (constructor):
      DataError: the file or the directory is missing or unusable.
    """

    splits: tuple[str, ...] = ("train",)
    evaluator: str = "captions"
    options: tuple[str, ...] = ("images",)
    fields: tuple[str, ...] = ()

    def __init__(self, path: str, images: str | None = None):
        self.name, self.file = path, storage.path(path)
        self.root = self.file.parent if images is None else storage.path(images)
        if images is not None and storage.kind(self.root) != "directory":
            raise DataError(f"the directory of images {images} of data source {path} is not a directory")
        self.rows = self.read()

    @classmethod
    def open(cls, rest: str, split: str) -> Self:
        """Opens a file from "PATH" or "PATH,images=DIRECTORY". It has no test split (see `open_source`).

        Raises:
          DataError: unknown option; otherwise see the class.
        """
        del split
        path, options = split_options(rest, cls.options)
        return cls(path, **options)

    def read(self) -> Rows:
        """The rows of the file.

        Raises:
          DataError: the file is missing or unusable.
        """
        rows = JsonRows(self.file)
        if rows.is_object(self.fields):
            raise DataError(f"{self.file} is one JSON object; it must be a JSON list or JSON Lines file of rows")
        return rows

    def parse(self, row: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """The images of a row (paths, or encoded bytes) and the other fields of its `Record`. Reads no files.

        Raises:
          InvalidRecordError: the row is unusable.
        """
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Record:
        images, fields = self.parse(self.rows[index])
        data = [image if isinstance(image, bytes) else read_image(self.root, image) for image in images]
        return Record(self.key(index), data, **fields)

    def key(self, index: int) -> str:
        """See `Source.key`. Ends with the row (from 1); without the directory, so that the data set can be moved."""
        return f"{self.file.name}/{index + 1}"

    def fingerprint(self) -> str:
        """See `Source.fingerprint`."""
        step = 1 if len(self) <= FINGERPRINTED_ROWS else -(-len(self) // HASHED_FILES)
        rows = range(0, len(self), step) if self.options else ()
        images = dict.fromkeys(image for index in rows for image in self._image_paths(index))
        return fingerprint_files(self.file.parent, [self.file]) + fingerprint_files(self.root, images)

    def _image_paths(self, index: int) -> list[pathlib.Path]:
        """The paths of the images of a row, which may not exist; none if the row is unusable."""
        try:
            images, _ = self.parse(self.rows[index])
            return [image_path(self.root, image) for image in images if not isinstance(image, bytes)]
        except InvalidRecordError:
            return []
