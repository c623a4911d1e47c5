"""The interface of data sources, held-out splits, fingerprints, and decoding with error handling."""

import collections
import dataclasses
import hashlib
import logging
import os
import pathlib
import threading
import zlib
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np

from unimm_jax import storage
from unimm_jax.data import transforms
from unimm_jax.data.outlines import Record, flatten
from unimm_jax.errors import DataError, EmptySplitError, InvalidRecordError

CACHE_BYTES = 2_000_000_000  # decoded images of a source are cached in memory if all of them fit
HASHED_BYTES = 256_000_000  # sources up to this size are fingerprinted by all of their contents
HASHED_FILES = 2_000  # larger sources by the contents of about this many files
SPLITS = ("train", "test")


class Source(Protocol):
    """Random access to records.

    Attributes:
      name: name for messages. Sources of files also have `root`, the directory of their files.
      splits: the splits that the source has itself, of "train" and "test".
      evaluator: evaluator that scores a model on the records, or "" for the loss only. Also an attribute of the class.
    """

    name: str
    splits: tuple[str, ...]
    evaluator: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """Reads a record.

        Raises:
          InvalidRecordError: the record is unusable.
        """
        ...

    def key(self, index: int) -> str:
        """The key of a record, without reading the record."""
        ...

    def fingerprint(self) -> str:
        """A digest of the contents, to detect changed data under the same name."""
        ...


class HeldOut:
    """One split of a source without a test split. Records whose key hashes below `share` are the test split.

    Args (constructor):
      source: the source.
      split: "train" or "test".
      share: share of the records in the test split, from 0 to 1.

    Raises (constructor):
      EmptySplitError: the split is empty.
    """

    splits: tuple[str, ...] = SPLITS

    def __init__(self, source: Source, split: str, share: float):
        self.source, self.name, self.evaluator = source, f"{source.name} ({split})", source.evaluator
        limit = round(share * 2**32)
        held = np.array([zlib.crc32(os.fsencode(source.key(i))) < limit for i in range(len(source))], bool)
        self.index = np.flatnonzero(held if split == "test" else ~held)
        if not len(self.index):
            raise EmptySplitError(
                f"{source.name} has {len(source)} records, none of them in its {split} split (config.data.held_out is "
                f"{share}); {'raise' if split == 'test' else 'lower'} config.data.held_out or add records"
            )

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> Record:
        return self.source[int(self.index[index])]

    def key(self, index: int) -> str:
        """See `Source.key`."""
        return self.source.key(int(self.index[index]))

    def fingerprint(self) -> str:
        """See `Source.fingerprint`."""
        return self.source.fingerprint()


def fingerprint_files(root: pathlib.Path, files: Iterable[pathlib.Path]) -> str:
    """A digest of names, sizes and contents of files: 16 hexadecimal digits.

    If all files together exceed `HASHED_BYTES`, only the contents of at most `HASHED_FILES` evenly spaced files count,
    and of a file above 2 MiB only 64 evenly spaced blocks of 64 KiB. On an object store, nothing is read: the checksums
    that the store computed count.

    Args:
      root: directory that the names are relative to.
      files: the files, in a fixed order.
    """
    digest, found = hashlib.sha256(), []
    if storage.is_remote(root):
        listed = list(files)
        for file, stamp in zip(listed, storage.versions(root, listed), strict=True):
            digest.update(f"{file.relative_to(root)} {stamp}\n".encode())
        return digest.hexdigest()[:16]
    for file in files:
        try:
            size = file.stat().st_size
        except OSError:
            size = -1
        digest.update(os.fsencode(file.relative_to(root)) + f" {size}\n".encode())
        if size >= 0:
            found.append((file, size))
    is_large = sum(size for _, size in found) > HASHED_BYTES
    if is_large:
        found = found[:: -(-len(found) // HASHED_FILES)]
    for file, size in found:
        try:
            with file.open("rb") as stream:
                if is_large and size > 2**21:
                    for start in np.linspace(0, size - 2**16, 64).astype(int).tolist():
                        stream.seek(start)
                        digest.update(stream.read(2**16))
                else:
                    while block := stream.read(2**20):
                        digest.update(block)
        except OSError as error:
            digest.update(str(error.errno).encode())
    return digest.hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Decoded:
    """A record with its images decoded and resized: `pixels` has one uint8 [S, S, 3] per image; do not modify."""

    record: Record
    pixels: tuple[np.ndarray, ...]


class DecodedDataset:
    """Decodes and resizes the records of a source by index.

    An unusable record is logged once and replaced by the next usable one, so the data order remains a function of the
    index.

    Attributes:
      invalid: index → reason, for the unusable records found so far.
      is_remote: whether records are read from an object store.

    Args (constructor):
      source: the source.
      size: side S of the images in pixels.
      needs: fields of `Record` that a usable record has, for example ("images",).
      fit, max_crop: how an image becomes a square, see `transforms.to_pixels`.

    Raises (constructor):
      DataError: no record is usable; the message counts the reasons.
    """

    def __init__(
        self, source: Source, size: int, needs: tuple[str, ...] = (), fit: str = "stretch", max_crop: float = 1.0
    ):
        self.source, self.size, self.needs = source, size, needs
        self._fit = (fit, max_crop)
        self.is_remote = storage.is_remote(getattr(getattr(source, "source", source), "root", ""))
        self.invalid: dict[int, str] = {}
        self._cache: dict[int, Decoded] | None = {} if len(source) * size * size * 3 <= CACHE_BYTES else None
        self._lock = threading.Lock()
        if not any(self.load(i) is not None for i in range(len(source))):
            reasons = collections.Counter(reason.split(":")[0] for reason in self.invalid.values())
            listed = "; ".join(f"{n} × {reason}" for reason, n in reasons.most_common(5))
            raise DataError(f"{source.name} has no usable record among {len(source)}: {listed}")

    def __len__(self) -> int:
        return len(self.source)

    def load(self, index: int) -> Decoded | None:
        """The record at `index`, without replacement, or None if it is unusable."""
        if index in self.invalid:
            return None
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        try:
            record = self.source[index]
            flatten(record)  # refuses records that are not of one kind
            if missing := [name for name in self.needs if not getattr(record, name)]:
                raise InvalidRecordError(f"it has no {' and no '.join(missing)}, which this stage needs")
            item = Decoded(record, tuple(transforms.to_pixels(image, self.size, *self._fit) for image in record.images))
        except InvalidRecordError as error:
            with self._lock:
                if index not in self.invalid:
                    self.invalid[index] = str(error)
                    logging.warning("skipped %s: %s", self.source.key(index), error)
            return None
        if self._cache is not None:
            self._cache[index] = item
        return item

    def usable(self, index: int) -> int:
        """The index of the record that is read at `index`: this one, or the next usable one."""
        for shift in range(len(self.source)):
            if self.load(found := (index + shift) % len(self.source)) is not None:
                return found
        raise DataError(f"{self.source.name} has no usable record left")

    def __getitem__(self, index: int) -> Decoded:
        item = self.load(index) or self.load(self.usable(index))
        assert item is not None
        return item

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.pop("_lock")
        state["_cache"] = None if self._cache is None else {}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()
