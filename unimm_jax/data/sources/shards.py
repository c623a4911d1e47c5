"""What sources of large files with many records (shards) share: the files of a description, and captions."""

import bisect
import concurrent.futures
import glob
import os
import pathlib
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from unimm_jax import storage
from unimm_jax.data.sources.files import as_text
from unimm_jax.errors import DataError, InvalidRecordError

MAX_SHARDS = 100_000  # files that one description may name
OPENERS = 16  # threads that open files
_BRACES = re.compile(r"\{(?:(\d{1,12})\.\.(\d{1,12})|([^{}]*,[^{}]*))\}")

T = TypeVar("T")


def expand_braces(pattern: str) -> Iterator[str]:
    """The names of a pattern with ranges such as {00000..00099} and lists such as {a,b}, in order."""
    match = _BRACES.search(pattern)
    if match is None:
        yield pattern
        return
    first, last, names = match.groups()
    values: Iterable[str]
    if names is None:
        padded = any(len(end) > 1 and end.startswith("0") for end in (first, last))
        width = max(len(first), len(last)) if padded else 0
        values = (f"{i:0{width}}" for i in range(int(first), int(last) + 1))
    else:
        values = names.split(",")
    for value in values:
        for rest in expand_braces(pattern[match.end() :]):
            yield pattern[: match.start()] + value + rest


def find_shards(pattern: str, suffix: str) -> tuple[pathlib.Path, list[pathlib.Path]]:
    """The files of a description, without duplicates, and the directory that contains all of them.

    Args:
      pattern: a file, a directory (its files with the suffix, sorted, with those of subdirectories), or a pattern with
        braces (see `expand_braces`) and the wildcards of `glob`.
      suffix: for example ".tar".

    Raises:
      DataError: there are none, one that is named does not exist, or the pattern names too many.
    """
    path = os.path.expanduser(pattern)
    if not path:
        raise DataError(f"a data source names no {suffix} file (FORMAT:PATH)")
    root = storage.path(path)
    kind = storage.kind(root)
    if kind == "directory":
        files = storage.find_files(root, lambda name: name.endswith(suffix))
        if not files:
            raise DataError(f"{pattern} holds no {suffix} files")
        return root, files
    list_names = _list_remote if storage.is_remote(path) else _list_local
    names: dict[str, bool] = {}
    for name in [path] if kind == "file" else expand_braces(path):
        names |= list_names(name)
        if len(names) > MAX_SHARDS:
            raise DataError(f"{pattern} names more than {MAX_SHARDS} files")
    if storage.is_remote(path):
        names = _look_up(names)
    if not names:
        raise DataError(f"{pattern} matches no file")
    if missing := [name for name, is_there in names.items() if not is_there]:
        raise DataError(f"{pattern} names {len(missing)} files that do not exist; the first is {missing[0]}")
    return storage.path(posixpath.commonpath([posixpath.dirname(name) for name in names])), list(
        map(storage.path, names)
    )


def _list_local(name: str) -> dict[str, bool]:
    """The absolute paths that a name without braces means, and whether each is a file."""
    is_pattern = glob.has_magic(name) and not os.path.exists(name)
    found = sorted(glob.glob(name, recursive=True)) if is_pattern else [name]
    return {os.path.abspath(file): os.path.isfile(file) for file in found}


def _list_remote(name: str) -> dict[str, bool]:
    """As `_list_local`, on an object store; a name without wildcards is not looked up."""
    if glob.has_magic(name):
        return dict.fromkeys(storage.glob(name), True)
    return {str(storage.path(name)): False}


def _look_up(names: dict[str, bool]) -> dict[str, bool]:
    """Looks up names on an object store, by listings of their directories."""
    folders = {posixpath.dirname(name) for name, is_there in names.items() if not is_there}
    listed = {folder: storage.children(storage.path(folder)) for folder in folders}
    present = {f"{folder}/{name}" for folder, found in listed.items() for name in found if not found[name]}
    return {name: is_there or name in present for name, is_there in names.items()}


def map_files(function: Callable[[pathlib.Path], T], files: Sequence[pathlib.Path]) -> list[T]:
    """Calls a function for each file, in threads; raises the error of the first file that has one."""
    with concurrent.futures.ThreadPoolExecutor(min(OPENERS, len(files))) as pool:
        futures = [pool.submit(function, file) for file in files]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def locate(starts: Sequence[int], index: int) -> tuple[int, int]:
    """The number of the part that contains an index, and the index inside of it.

    Args:
      starts: first index of each part, and the number of all records; parts may be empty.
      index: of a record.
    """
    if not 0 <= index < starts[-1]:
        raise IndexError(index)
    part = bisect.bisect_right(starts, index) - 1
    return part, index - starts[part]


def decode_text(data: bytes, name: str) -> str:
    """Bytes as text.

    Raises:
      InvalidRecordError: it is not UTF-8; the message contains `name`.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidRecordError(f"its {name} is not UTF-8 text ({error.reason} at byte {error.start})") from None


def captions_of(value: Any, name: str) -> list[str]:
    """The captions in a value: a text or a list of texts, also as UTF-8 bytes; empty ones are left out.

    Raises:
      InvalidRecordError: it is neither, or no caption is left; the message contains `name`.
    """
    texts = value if isinstance(value, list) else [value]
    texts = [decode_text(text, name) if isinstance(text, bytes) else as_text(text, name) for text in texts]
    if captions := [text.strip() for text in texts if text.strip()]:
        return captions
    raise InvalidRecordError(f"its {name} is empty")
