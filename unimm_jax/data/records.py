"""Records on disk: images and texts, and the keep masks and codes that the frozen image tokenizer computed.

`unimm_jax.pretokenize` writes them; the language and decoder stages read them.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import pathlib
import threading
import uuid
import zipfile
from collections.abc import Iterable
from typing import Any

import msgpack
import numpy as np

from unimm_jax import legacy, storage
from unimm_jax.data import slices, transforms
from unimm_jax.data.outlines import Outline, Record, flatten, outline
from unimm_jax.data.remote_blocks import RemoteBlocks
from unimm_jax.data.sources.base import CACHE_BYTES
from unimm_jax.errors import DamagedRecordsError, DataError, EmptySplitError
from unimm_jax.text_tokenizer import TextTokenizer

FORMAT = 2  # of the records
# lists of integers of each record in the index, in this order: kept patches per image, tokens per text, outline codes,
# width and height per image
RAGGED = {"kept": np.uint16, "texts": np.uint32, "outlines": np.uint8, "sizes": np.uint16}


class RecordWriter:
    """Writes the records of one split to a directory in blocks.

    An interrupted run can resume, and several processes can write different blocks. Files per block:
    `blocks/NNNNNN.array_record` and `blocks/NNNNNN.npz` (lengths and a digest); then `index/*.npy` and `header.json`. A
    block is complete when its `.npz` exists, a directory when its `header.json` exists.

    Args (constructor):
      path: the directory; created if missing.
      text_tokenizer: counts the tokens of the texts.
      identity: JSON-compatible description of tokenizer and data (fingerprint, sources, ...).

    Raises (constructor):
      DataError: the directory holds unfinished records of another tokenizer or other data.
    """

    def __init__(self, path: str | pathlib.Path, text_tokenizer: TextTokenizer, identity: dict[str, Any]):
        self.path, self.text_tokenizer = storage.path(path), text_tokenizer
        (self.path / "blocks").mkdir(parents=True, exist_ok=True)
        self.identity = json.loads(json.dumps(identity | {"text_tokenizer": text_tokenizer.payload}))
        plan = self.path / "plan.json"
        if plan.exists() and json.loads(plan.read_text()) != self.identity:
            raise DataError(
                f"{path} holds unfinished records of another tokenizer or other data; remove it or choose another "
                "--output"
            )
        storage.write_whole(plan, json.dumps(self.identity).encode())

    def _file(self, block: int, ending: str) -> pathlib.Path:
        return self.path / "blocks" / f"{block:06d}.{ending}"

    def has(self, block: int) -> bool:
        """Whether a block is complete, in the format of this version."""
        file = self._file(block, "npz")
        if not file.exists():
            return False
        with np.load(io.BytesIO(file.read_bytes())) as index:
            return set(RAGGED) <= set(index.files)

    def write(self, block: int, items: Iterable[tuple[int, Record, np.ndarray, np.ndarray]]) -> None:
        """Writes one block.

        Args:
          block: its number.
          items: (number of the source, record, keep masks boolean [N, P], codes int [N, P]) with N the number of images
            of the record; codes are stored for kept patches only.
        """
        from array_record.python.array_record_module import ArrayRecordWriter

        source_of: list[int] = []
        kept: list[list[int]] = []
        texts: list[list[int]] = []
        outlines: list[list[int]] = []
        sizes: list[list[int]] = []
        spool = storage.Spool(self.path / "blocks")
        partial = spool.folder / f"{block:06d}.array_record.{uuid.uuid4().hex}"
        writer = ArrayRecordWriter(str(partial), "group_size:1")
        for source, record, keep_NP, codes_NP in items:
            strings, outline = flatten(record)
            data = {
                "key": os.fsencode(record.key).decode("utf-8", "backslashreplace"),
                "images": [x if isinstance(x, bytes) else transforms.encode_png(x) for x in record.images],
                "keep": [np.packbits(keep).tobytes() for keep in keep_NP],
                "codes": [_packed(codes[keep]) for codes, keep in zip(codes_NP, keep_NP, strict=True)],
                "texts": strings,
                "kinds": [question.kind for question in record.questions],
            }
            writer.write(msgpack.packb(data))
            source_of.append(source)
            kept.append([int(keep.sum()) for keep in keep_NP])
            texts.append([len(self.text_tokenizer.encode(text)) for text in strings])
            outlines.append(list(outline))
            sizes.append([side for image in record.images for side in transforms.size_of(image)])
        writer.close()
        digest = hashlib.sha256(partial.read_bytes()).hexdigest()
        partial.rename(spool.folder / self._file(block, "array_record").name)
        spool.close()
        arrays: dict[str, Any] = {"source": np.array(source_of, np.uint16)}
        for (name, dtype), lists in zip(RAGGED.items(), (kept, texts, outlines, sizes), strict=True):
            arrays[name] = np.array([n for row in lists for n in row], dtype)
            arrays[f"{name}_counts"] = np.array([len(row) for row in lists], np.int64)
        buffer = io.BytesIO()
        np.savez(buffer, digest=np.array([digest]), **arrays)
        storage.write_whole(self._file(block, "npz"), buffer.getvalue())

    def copy(self, block: int, other: pathlib.Path) -> None:
        """Copies a block from the directory `other`.

        Raises:
          DamagedRecordsError: the block in `other` is missing or damaged.
        """
        source = other / "blocks" / f"{block:06d}.array_record"
        try:
            data, index = storage.read(source), storage.read(source.with_suffix(".npz"))
            with np.load(io.BytesIO(index)) as arrays:
                intact = arrays["digest"][0] == hashlib.sha256(data).hexdigest()
        except (FileNotFoundError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            intact = False
        if not intact:
            raise DamagedRecordsError(
                f"block {block} of the records in {other} is damaged or missing; leave out --reuse, or write those "
                "records again"
            )
        storage.write_whole(self._file(block, "array_record"), data)
        storage.write_whole(self._file(block, "npz"), index)

    def close(self, blocks: int, header: dict[str, Any]) -> dict[str, Any]:
        """Writes `index/` and `header.json`, once all blocks are complete.

        Args:
          blocks: number of blocks.
          header: at least `num_patches`, `codes`, `positions`, `selection` and `image_size`.

        Returns:
          the header as written, with the number of records and the mean number of tokens per image.
        """
        parts = [np.load(io.BytesIO(self._file(block, "npz").read_bytes())) for block in range(blocks)]
        joined: dict[str, Any] = {key: np.concatenate([part[key] for part in parts]) for key in parts[0].files}
        contents = hashlib.sha256("".join(joined.pop("digest")).encode()).hexdigest()[:16]
        (self.path / "index").mkdir(exist_ok=True)
        for name in RAGGED:
            joined[f"{name}_ends"] = np.concatenate([[0], np.cumsum(joined.pop(f"{name}_counts"))])
        for name, array in joined.items():
            buffer = io.BytesIO()
            np.save(buffer, array)
            storage.write_whole(self.path / "index" / f"{name}.npy", buffer.getvalue())
        kept = joined["kept"]
        header = self.identity | header
        header |= dict(
            records_format=FORMAT,
            records=len(joined["source"]),
            images=len(kept),
            blocks=blocks,
            block_records=[len(part["source"]) for part in parts],
            tokens=round(float(kept.mean()), 4) if len(kept) else 0.0,
            contents=contents,
        )
        storage.write_whole(self.path / "header.json", json.dumps(header).encode())
        for left in (self.path / "blocks").glob("*.array_record.*"):  # by processes that were killed
            left.unlink(missing_ok=True)
        return header


def _packed(codes: np.ndarray) -> bytes:
    return codes.astype("<u4" if codes.max(initial=0) > 65535 else "<u2").tobytes()


@dataclasses.dataclass(frozen=True)
class StoredRecord:
    """A record as stored; do not modify.

    Attributes:
      images: encoded bytes. keep: boolean [P] per image. codes: int32 [P] per image, 0 at dropped patches.
      texts: as `outlines.flatten` orders them. kinds: kind of each question.
    """

    key: str
    images: list[bytes]
    keep: list[np.ndarray]
    codes: list[np.ndarray]
    texts: list[str]
    kinds: list[str]


def _mapped(file: pathlib.Path) -> np.ndarray:
    """An array over a mapped file, which stays readable when its name is removed."""
    return np.asarray(np.load(file, mmap_mode="r"))


class Records:
    """Random access to the records of one split, in a directory that `unimm_jax.pretokenize` wrote.

    The index is mapped into memory, not read.

    Attributes:
      header: contents of `header.json`: fingerprints, shapes and counts.
      text_tokenizer: the tokenizer that counted the texts. fit: how an image becomes a square, see `transforms.resize`.
      source: number of the source of each record in `header["sources"]`.
      kept, texts, outlines, sizes: of record i, by `[i]`: kept patches of each image, tokens of each text, outline
        codes, width and height of each image. has_sizes: False for records of an earlier version, without `sizes`.

    Raises (constructor):
      DataError: the directory holds no finished records. DamagedRecordsError: files are missing, damaged or of another
        version.
    """

    def __init__(self, path: str | pathlib.Path):
        self.path = storage.path(path)
        if not storage.kind(self.path / "header.json"):
            raise DataError(f"{path} holds no finished records; write them with python -m unimm_jax.pretokenize")
        try:
            self.header: dict[str, Any] = legacy.header(json.loads(storage.read(self.path / "header.json")))
            self.text_tokenizer = TextTokenizer(self.header["text_tokenizer"])
            index = self._index()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedRecordsError(
                f"the records in {path} are damaged ({error}); write them again with python -m unimm_jax.pretokenize"
            ) from None
        self.source: np.ndarray = index["source"]
        self.has_sizes = "sizes" in index
        found = {name: Ragged(index[name], index[f"{name}_ends"]) for name in RAGGED if name in index}
        self.kept, self.texts, self.outlines = found["kept"], found["texts"], found["outlines"]
        self.sizes = found.get("sizes", Ragged(np.zeros(0, np.uint16), np.zeros(len(self.source) + 1, np.int64)))
        self._reader: Any = None
        self._items: dict[int, StoredRecord] = {}
        self._images: dict[tuple[int, int], np.ndarray] = {}
        self.fit = str(self.header.get("fit", "stretch"))  # not in records of an earlier version
        # if so, all of it is cached
        self._small = self.num_images * self.header["image_size"] ** 2 * 3 <= CACHE_BYTES
        self._views: dict[tuple[Any, ...], list[np.ndarray]] = {}
        self._small_views = self._small and self._pixels() * 3 <= CACHE_BYTES
        self._lock = threading.Lock()

    def _pixels(self) -> int:
        """Number of pixels of all images."""
        return int(self.sizes.values.reshape(-1, 2).astype(np.int64).prod(-1).sum())

    def _index(self) -> dict[str, np.ndarray]:
        if storage.kind(self.path / "index.npz"):
            return legacy.record_index(storage.open_copy(self.path / "index.npz", lambda file: dict(np.load(file))))
        names = ["source", *RAGGED, *(f"{name}_ends" for name in RAGGED)]
        later = ("sizes", "sizes_ends")  # not in records of an earlier version
        if not any(storage.kind(self.path / "index" / f"{name}.npy") for name in later):
            names = [name for name in names if name not in later]
        # as plain arrays over the mapped files, whose elements are read several times faster than those of np.memmap
        return {name: storage.open_copy(self.path / "index" / f"{name}.npy", _mapped) for name in names}

    @classmethod
    def open(cls, path: str | pathlib.Path, split: str = "train") -> "Records":
        """Opens the records of split "train" or "test"; the test split is in the subdirectory `test`.

        Raises:
          EmptySplitError: there are no records of split "test". DataError: see the class.
        """
        if split == "test":
            path = storage.path(path) / "test"
            if not storage.kind(path):
                raise EmptySplitError(f"there are no held-out records: {path} does not exist")
            if not storage.kind(path / "header.json"):
                raise DamagedRecordsError(f"{path / 'header.json'} is missing; restore it, or write the records again")
        return cls(path)

    def __len__(self) -> int:
        return len(self.source)

    @property
    def num_images(self) -> int:
        """Number of images of all records."""
        return len(self.kept.values)

    def image_place(self, number: int) -> tuple[int, int]:
        """(record, index of the image in it) of image `number` of `num_images`."""
        record = int(np.searchsorted(self.kept.ends, number, side="right")) - 1
        return record, number - int(self.kept.ends[record])

    def outline(self, index: int) -> Outline:
        """The outline of a record, without reading the record."""
        return outline(self.outlines[index].tobytes(), len(self.kept[index]))

    def __getitem__(self, index: int) -> StoredRecord:
        if index in self._items:
            return self._items[index]
        try:
            with self._lock:
                if self._reader is None:
                    self._reader = self._open_blocks()
            # threads fetch blocks of an object store at the same time
            with contextlib.nullcontext() if storage.is_remote(self.path) else self._lock:
                data = self._reader[index]
            item = legacy.record(msgpack.unpackb(data))
        except FileNotFoundError as error:
            raise DamagedRecordsError(
                f"a block of the records in {self.path} is missing ({error}); restore it, or remove that directory "
                "and write it again with python -m unimm_jax.pretokenize"
            ) from None
        except (RuntimeError, ValueError) as error:
            raise DamagedRecordsError(
                f"the blocks of the records in {self.path} are damaged ({str(error).strip().splitlines()[0]}); "
                "remove that directory and write it again with python -m unimm_jax.pretokenize"
            ) from None
        num_patches = self.header["num_patches"]
        keeps, codes = [], []
        for packed_keep, packed_codes in zip(item["keep"], item["codes"], strict=True):
            keep = np.unpackbits(np.frombuffer(packed_keep, np.uint8), count=num_patches).astype(bool)
            full = np.zeros(num_patches, np.int32)
            full[keep] = np.frombuffer(packed_codes, "<u2" if len(packed_codes) == 2 * keep.sum() else "<u4")
            keeps.append(keep)
            codes.append(full)
        record = StoredRecord(item["key"], item["images"], keeps, codes, item["texts"], item["kinds"])
        if self._small:
            self._items[index] = record
        return record

    def _open_blocks(self) -> Any:
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        files = [self.path / "blocks" / f"{block:06d}.array_record" for block in range(self.header["blocks"])]
        if storage.is_remote(self.path):
            return RemoteBlocks(files, self.header["block_records"])  # with a lock of its own for each block
        return ArrayRecordDataSource(list(map(str, files)))

    def image(self, index: int, number: int = 0) -> np.ndarray:
        """A decoded image of a record, uint8 [S, S, 3] with S = header["image_size"]; cached, do not modify."""
        place = (index, number)
        if place in self._images:
            return self._images[place]
        image = self.resized(index, number, self.header["image_size"])
        if self._small:
            self._images[place] = image
        return image

    def resized(self, index: int, number: int, size: int) -> np.ndarray:
        """A decoded image of a record with sides of `size` pixels, uint8 [size, size, 3]; not cached."""
        return transforms.to_pixels(self[index].images[number], size, self.fit)

    def views(self, index: int, number: int, side: int, max_slices: int, rule: str) -> list[np.ndarray]:
        """The views of an image of a record: the whole image, then its slices, each uint8 [side, side, 3].

        They are cached where the images of all records are small; do not modify.

        Args:
          max_slices, rule: see `slices.choose_grid`; 0 gives the whole image alone.
        """
        if not max_slices and side == self.header["image_size"]:
            return [self.image(index, number)]
        place = (index, number, side, max_slices, rule)
        if place in self._views:
            return self._views[place]
        image = transforms.decode_image(self[index].images[number])
        grid = slices.choose_grid(*image.size, side, max_slices, rule) if max_slices else None
        found = slices.views(image, side, grid, self.fit)
        if self._small_views:
            self._views[place] = found
        return found


class Ragged:
    """Lists of integers of different lengths in one array; `ends` starts with 0."""

    def __init__(self, values: np.ndarray, ends: np.ndarray):
        self.values, self.ends = values, ends

    def __getitem__(self, index: int) -> np.ndarray:
        return self.values[self.ends[index] : self.ends[index + 1]]
