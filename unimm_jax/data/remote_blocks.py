"""Records by index from ArrayRecord files on an object store."""

import pathlib
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from unimm_jax import storage
from unimm_jax.data.recent import Recent

OPEN_BLOCKS = 64


class RemoteBlocks:
    """Records by index. Files are copied to the cache as they are read, several at the same time if threads ask.

    The readers of the last `OPEN_BLOCKS` files stay open: reading a record of one of them asks the store nothing. Those
    whose copies were removed from the cache are closed when another file is opened, because they still take space.

    Args (constructor):
      files: the ArrayRecord files. counts: number of records of each.
    """

    def __init__(self, files: Sequence[pathlib.Path], counts: Sequence[int]):
        self.files, self.ends = files, np.cumsum(counts)
        self._readers = Recent(OPEN_BLOCKS)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> bytes:
        block = int(np.searchsorted(self.ends, index, side="right"))
        first = int(self.ends[block - 1]) if block else 0
        reader, lock, _ = self._readers.get(block, lambda: (self._open(block), 1))
        with lock:
            (record,) = reader.read([index - first])
        return bytes(record)

    def _open(self, block: int) -> tuple[Any, threading.Lock, pathlib.Path]:
        reader, copy = storage.open_copy(self.files[block], _reader)
        self._readers.drop(lambda opened: not opened[2].exists())
        return reader, threading.Lock(), copy


def _reader(file: pathlib.Path) -> tuple[Any, pathlib.Path]:
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(str(file))
    if not reader.ok():  # it says why when a record is read
        reader.read([0])
    return reader, file
