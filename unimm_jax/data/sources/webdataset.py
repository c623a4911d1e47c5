"""Tar files whose members are the images and captions of samples (WebDataset), read by index."""

import itertools
import json
import logging
import os
import pathlib
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from unimm_jax import storage
from unimm_jax.data.outlines import Record
from unimm_jax.data.sources.base import fingerprint_files
from unimm_jax.data.sources.files import MAX_IMAGE_BYTES, load_arrays, save_arrays
from unimm_jax.data.sources.shards import captions_of, decode_text, find_shards, locate, map_files
from unimm_jax.errors import DataError, InvalidRecordError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
CAPTION_FIELDS = ("caption", "captions", "text")  # of a .json; the first that is present counts
INDEX_SUFFIX = ".index.npz"  # after the name of the tar
VERSION = 1  # of the stored index
IMAGE, TXT, JSON = range(3)  # what a sample has
ABSENT, SEVERAL = -1, -2  # offsets of a member that a sample does not have, or has with several extensions

BLOCK = 512
WINDOW = 2**23  # bytes of a tar on an object store that are read at a time for its index
GAP = 2**16  # bytes between two members up to which one read gives both
MAX_EXTENDED = 2**20  # bytes of a long name or of PAX records
MAX_SIZE = 2**62  # that a span can store; no member has so many bytes
_REGULAR = (b"0", b"\0", b"7")
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, directories
_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
}


class TarIndex(NamedTuple):
    """Where the members of the samples of a tar are.

    Attributes:
      spans: int64 [N, 3, 2], offset and size of the image, the .txt and the .json; see `ABSENT`.
      names: uint8, the names of the samples one after another. ends: int64 [N], where they end.
      damage: where and how the tar is damaged, or "".
    """

    spans: np.ndarray
    names: np.ndarray
    ends: np.ndarray
    damage: str

    def name(self, sample: int) -> str:
        """The name of a sample: directory and base name up to the first dot."""
        start = self.ends[sample - 1] if sample else 0
        return os.fsdecode(self.names[start : self.ends[sample]].tobytes())


class _DamagedError(Exception):
    """A tar cannot be read further; the message has the offset and the reason."""


class WebdatasetSource:
    """Tars with samples: members that have the same directory and the same base name up to the first dot.

    A sample has an image (`IMAGE_EXTENSIONS`) and a caption: the whole `.txt`, or else one of `CAPTION_FIELDS` of the
    `.json`, a text or a list of texts. Other members are ignored. The headers of each tar are read once; where its
    members are is stored in a file beside it, or in the cache if the directory is not writable. Samples before the
    damage of a tar are used. A record is read by one request on an object store.

    Args (constructor):
      path: a tar, a directory with tars, or a pattern (see `find_shards`).

    Raises (constructor):
      DataError: there are no tars or no samples, or a tar cannot be read or is compressed.
    """

    splits: tuple[str, ...] = ("train",)
    evaluator = "captions"

    def __init__(self, path: str):
        self.name = path
        self.root, self.files = find_shards(path, ".tar")
        self.indices = map_files(open_index, self.files)
        for file, index in zip(self.files, self.indices, strict=True):
            if index.damage:
                n = len(index.spans)
                logging.warning("%s is damaged at %s; the %d samples up to there are used", file, index.damage, n)
        self.starts = [0, *itertools.accumulate(len(index.spans) for index in self.indices)]
        if not len(self):
            damaged = [f"; {f} is damaged at {i.damage}" for f, i in zip(self.files, self.indices) if i.damage]
            message = f"{path} has no samples (.jpg, .txt, …) in {len(self.files)} tar files"
            raise DataError(message + "".join(damaged[:1]))
        self.labels = [file.relative_to(self.root).as_posix() for file in self.files]

    @classmethod
    def open(cls, rest: str, split: str) -> "WebdatasetSource":
        """Opens tars. They have no test split (see `open_source`).

        Raises:
          DataError: see the class.
        """
        del split
        return cls(rest)

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> Record:
        tar, sample = locate(self.starts, index)
        image, txt, info = self.indices[tar].spans[sample].tolist()
        if image[0] == SEVERAL:
            raise InvalidRecordError(f"it has several images ({', '.join(IMAGE_EXTENSIONS)})")
        if image[0] == ABSENT:
            raise InvalidRecordError(f"it has no image ({', '.join(IMAGE_EXTENSIONS)})")
        if txt[0] == ABSENT and info[0] == ABSENT:
            raise InvalidRecordError("it has no caption (.txt or .json)")
        if txt[0] != ABSENT:
            text, data = read_members(self.files[tar], {".txt": txt, "image": image})
            captions = captions_of(text, "caption")
        else:
            text, data = read_members(self.files[tar], {".json": info, "image": image})
            captions = _json_captions(text)
        return Record(self.key(index), (data,), captions=captions)

    def key(self, index: int) -> str:
        """See `Source.key`: the path of the tar below the directory of all tars, and the name of the sample."""
        tar, sample = locate(self.starts, index)
        return f"{self.labels[tar]}/{self.indices[tar].name(sample)}"

    def fingerprint(self) -> str:
        """See `Source.fingerprint`."""
        return fingerprint_files(self.root, self.files)


def read_members(file: pathlib.Path, spans: dict[str, Sequence[int]]) -> list[bytes]:
    """Reads members of a tar, by offset and size; those that are close to each other by one read.

    Args:
      spans: name of a member for messages → offset and size.

    Raises:
      InvalidRecordError: one is empty, very large, cut off or unreadable; the message contains its name.
    """
    for name, (_, size) in spans.items():
        if not 0 < size <= MAX_IMAGE_BYTES:
            reason = "is empty" if not size else f"has more than {MAX_IMAGE_BYTES} bytes"
            raise InvalidRecordError(f"its {name} {reason}")
    first, end = min(at for at, _ in spans.values()), max(at + size for at, size in spans.values())
    is_close = end - first <= sum(size for _, size in spans.values()) + GAP
    found = []
    try:
        whole = storage.read(file, first, end - first) if is_close else b""
        for name, (at, size) in spans.items():
            data = whole[at - first : at - first + size] if is_close else storage.read(file, at, size)
            if len(data) < size:
                raise InvalidRecordError(f"its {name} is cut off, since the tar is truncated")
            found.append(data)
    except OSError as error:
        raise InvalidRecordError(f"its tar cannot be read ({error.strerror})") from error
    return found


class Tar:
    """The bytes of an open tar at any place. On an object store, they are read in windows."""

    def __init__(self, file: pathlib.Path):
        self.file = file
        self.stream = None if storage.is_remote(file) else file.open("rb", buffering=0)
        self._start, self._data = 0, b""

    def __enter__(self) -> "Tar":
        return self

    def __exit__(self, *error: object) -> None:
        if self.stream:
            self.stream.close()

    def read(self, offset: int, size: int) -> bytes:
        """Reads `size` bytes, or less at the end of the file."""
        if self.stream:
            self.stream.seek(offset)
            return storage.read_whole(self.stream, size)
        at = offset - self._start
        if not 0 <= at <= at + size <= len(self._data):
            self._start, self._data, at = offset, storage.read(self.file, offset, max(size, WINDOW)), 0
        return self._data[at : at + size]


def _json_captions(data: bytes) -> list[str]:
    """The captions in a .json."""
    try:
        row = json.loads(decode_text(data, ".json"))
    except (ValueError, RecursionError) as error:
        raise InvalidRecordError(f"its .json is not JSON ({error})") from None
    if not isinstance(row, dict):
        raise InvalidRecordError(f"its .json is {type(row).__name__}, not an object")
    if "conversations" in row:
        raise InvalidRecordError("its .json has conversations, which are not read from tars (unpack: format llava)")
    for name in CAPTION_FIELDS:
        if row.get(name) is not None:
            return captions_of(row[name], name)
    raise InvalidRecordError(f"its .json has no {' or '.join(CAPTION_FIELDS)}")


def open_index(file: pathlib.Path) -> TarIndex:
    """The index of a tar, from the file beside it or in the cache if that belongs to this version of the tar.

    Raises:
      DataError: the tar cannot be read, or is compressed.
    """
    try:
        size, text = version = storage.version(file)
        number = zlib.crc32(text.encode()) if storage.is_remote(file) else int(text)
        stamp = np.array([VERSION, size, number], np.int64)
        places = (file.with_name(file.name + INDEX_SUFFIX), storage.cache_place(file, version, INDEX_SUFFIX))
        for place in places:
            if (index := _load_index(place, stamp)) is not None:
                return index
        with Tar(file) as tar:
            index = _build_index(tar, size, file)
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror})") from error
    if not save_arrays(places[0], stamp=stamp, **index._asdict()):
        save_arrays(places[1], stamp=stamp, **index._asdict())
    return index


def _load_index(file: pathlib.Path, stamp: np.ndarray) -> TarIndex | None:
    """A stored index, or None if there is none that is usable."""
    data = load_arrays(file) or {}
    if not {"stamp", "spans", "names", "ends", "damage"} <= set(data) or not np.array_equal(data["stamp"], stamp):
        return None
    index = TarIndex(data["spans"], data["names"], data["ends"], str(data["damage"]))
    n = len(index.ends) if index.ends.ndim == 1 else -1
    is_sound = index.spans.shape == (n, 3, 2) and index.names.ndim == 1
    return index if is_sound and len(index.names) == (index.ends[-1] if n else 0) else None


def _build_index(tar: Tar, total: int, file: pathlib.Path) -> TarIndex:
    """Reads the headers of a tar of `total` bytes."""
    start = tar.read(0, BLOCK)
    for magic, (method, command) in _COMPRESSED.items():
        if start.startswith(magic):
            raise DataError(
                f"{file} is compressed with {method}; unpack it ({command}), so that it can be read by index"
            )
    samples: dict[bytes, list[list[int]]] = {}
    extensions: dict[bytes, str] = {}  # of the image of a sample
    damage = ""
    try:
        for name, offset, size in members(tar, total):
            directory, slash, base = name.removeprefix(b"./").rpartition(b"/")
            base, _, ending = base.partition(b".")
            extension, stem = ending.decode("latin-1").lower(), directory + slash + base
            part = IMAGE if extension in IMAGE_EXTENSIONS else {"txt": TXT, "json": JSON}.get(extension)
            if part is None or not base:
                continue
            spans = samples.setdefault(stem, [[ABSENT, 0] for _ in range(3)])
            if part == IMAGE and extensions.setdefault(stem, extension) != extension:
                offset = SEVERAL
            if spans[part][0] != SEVERAL:
                # if a name is there twice, the last member counts, as for tar
                spans[part] = [offset, min(size, MAX_SIZE)]
    except _DamagedError as error:
        damage = str(error)
    return TarIndex(
        np.array(list(samples.values()), np.int64).reshape(-1, 3, 2),
        np.frombuffer(b"".join(samples), np.uint8),
        np.cumsum([len(stem) for stem in samples], dtype=np.int64),
        damage,
    )


def members(tar: Tar, total: int) -> Iterator[tuple[bytes, int, int]]:
    """Name, offset and size of each regular file in a tar of `total` bytes; reads only headers.

    Understands ustar, GNU long names and sizes, and PAX paths and sizes. Yields a file whose data are cut off.

    Raises:
      _DamagedError: the tar is truncated or damaged.
    """
    at = 0
    extended: dict[bytes, bytes] = {}  # path and size of the next member
    while True:
        header = tar.read(at, BLOCK)
        if len(header) < BLOCK:
            where = "inside of a header" if header else "without an end mark"
            raise _DamagedError(f"byte {at} (the file ends {where})")
        if not any(header):
            return
        try:
            kind, name, size = _parse_header(header)
            if kind in (b"L", b"x"):
                if size > MAX_EXTENDED or at + BLOCK + size > total:
                    raise ValueError("a header of a long name is cut off or too large")
                data = tar.read(at + BLOCK, size)
                extended |= {b"path": data.partition(b"\0")[0]} if kind == b"L" else _pax_records(data)
            elif kind != b"K" and kind != b"g":
                name, size = extended.get(b"path", name), int(extended.get(b"size", size))
                if size < 0:
                    raise ValueError("a size is negative")
                extended = {}
        except ValueError as error:
            raise _DamagedError(f"byte {at} ({error})") from None
        if kind in _REGULAR and not name.endswith(b"/"):
            yield name, at + BLOCK, size
        if kind in _WITHOUT_DATA:
            size = 0
        if at + BLOCK + size > total:
            raise _DamagedError(f"byte {at} (the file ends at byte {total}, inside of a member)")
        at += BLOCK + -(-size // BLOCK) * BLOCK


def _parse_header(header: bytes) -> tuple[bytes, bytes, int]:
    """Type, name and size of a member. Raises ValueError if it is not a header."""
    try:
        checksum = _number(header[148:156])
    except ValueError:
        checksum = -1
    if checksum != sum(header[:148]) + 8 * ord(" ") + sum(header[156:]):
        raise ValueError("no header of a tar")
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    size = _number(header[124:136])
    if size < 0:
        raise ValueError("a size is negative")
    return header[156:157], prefix + b"/" + name if prefix else name, size


def _number(field: bytes) -> int:
    """A number of a header: octal digits, or big-endian bytes after a first bit of 1."""
    if field[0] & 0x80:
        return int.from_bytes(field, "big", signed=True) if field[0] == 0xFF else int.from_bytes(field[1:], "big")
    return int(field.partition(b"\0")[0].strip() or b"0", 8)


def _pax_records(data: bytes) -> dict[bytes, bytes]:
    """The records "LENGTH NAME=VALUE\\n" of an extended header. Raises ValueError if they are damaged."""
    records = {}
    while data.strip(b"\0"):
        digits = data.partition(b" ")[0]
        length = int(digits)
        if not len(digits) < length <= len(data):
            raise ValueError("damaged PAX records")
        name, _, value = data[len(digits) + 1 : length - 1].partition(b"=")
        records[name] = value
        data = data[length:]
    return records
