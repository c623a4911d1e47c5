"""Records: each image with its texts, and the keep mask and codes that the frozen image tokenizer computed for it.

`unimm_jax.pretokenize` writes them; the language and decoder stages read them.
"""

import hashlib
import io
import json
import os
import pathlib
import threading
import uuid
from collections.abc import Iterable
from typing import Any

import msgpack
import numpy as np

from unimm_jax import legacy
from unimm_jax.data import transforms
from unimm_jax.data.sources.base import CACHE_BYTES
from unimm_jax.errors import DataError
from unimm_jax.text_tokenizer import TextTokenizer


class RecordWriter:
    """Writes the records of one split to a directory in blocks.

    An interrupted run can resume, and several processes can write different blocks. Files per block:
    `blocks/NNNNNN.array_record` and `blocks/NNNNNN.npz` (lengths and a digest); then `index.npz` and `header.json`. A
    block is complete when its `.npz` exists, a directory when its `header.json` exists.

    Args (constructor):
      path: the directory; created if missing.
      text_tokenizer: counts the tokens of the texts.
      identity: JSON-compatible description of tokenizer and data (fingerprint, sources, ...).

    Raises (constructor):
      DataError: the directory holds unfinished records of another tokenizer or other data.
    """

    def __init__(self, path: str | pathlib.Path, text_tokenizer: TextTokenizer, identity: dict[str, Any]):
        self.path, self.text_tokenizer = pathlib.Path(path), text_tokenizer
        (self.path / "blocks").mkdir(parents=True, exist_ok=True)
        self.identity = json.loads(json.dumps(identity | {"text_tokenizer": text_tokenizer.payload}))
        plan = self.path / "plan.json"
        if plan.exists() and json.loads(plan.read_text()) != self.identity:
            raise DataError(
                f"{path} holds unfinished records of another tokenizer or other data; remove it or choose another "
                "--output"
            )
        _write_whole(plan, json.dumps(self.identity).encode())

    def _file(self, block: int, ending: str) -> pathlib.Path:
        return self.path / "blocks" / f"{block:06d}.{ending}"

    def has(self, block: int) -> bool:
        """Whether a block is complete."""
        return self._file(block, "npz").exists()

    def write(self, block: int, items: Iterable[tuple[dict, np.ndarray, np.ndarray]]) -> None:
        """Writes one block.

        Args:
          block: its number.
          items: (source record, keep mask boolean [P], codes int [P]); codes are stored for kept patches only.
        """
        from array_record.python.array_record_module import ArrayRecordWriter

        kept: list[int] = []
        captions: list[list[int]] = []
        questions: list[list[int]] = []
        partial = self._file(block, f"array_record.{uuid.uuid4().hex}")
        writer = ArrayRecordWriter(str(partial), "group_size:1")
        for item, keep, codes in items:
            image = item["image_data"]
            data = {
                "key": os.fsencode(item["key"]).decode("utf-8", "backslashreplace"),
                "image_data": image if isinstance(image, bytes) else transforms.encode_png(image),
                "keep": np.packbits(keep).tobytes(),
                "codes": codes[keep].astype("<u4" if codes.max(initial=0) > 65535 else "<u2").tobytes(),
                "captions": item["captions"],
                "questions": item["questions"],
            }
            writer.write(msgpack.packb(data))
            kept.append(int(keep.sum()))
            captions.append([self._count(c) for c in item["captions"]])
            questions.append([self._count(q) + self._count(a) + 1 for q, a, _ in item["questions"]])
        writer.close()
        partial.rename(self._file(block, "array_record"))
        buffer = io.BytesIO()
        np.savez(
            buffer,
            kept=np.array(kept, np.int32),
            captions=_flat(captions),
            caption_counts=_lengths(captions),
            questions=_flat(questions),
            question_counts=_lengths(questions),
            digest=np.array([hashlib.sha256(self._file(block, "array_record").read_bytes()).hexdigest()]),
        )
        _write_whole(self._file(block, "npz"), buffer.getvalue())

    def _count(self, text: str) -> int:
        return len(self.text_tokenizer.encode(text))

    def close(self, blocks: int, header: dict[str, Any]) -> dict[str, Any]:
        """Writes `index.npz` and `header.json`, once all blocks are complete.

        Args:
          blocks: number of blocks.
          header: at least `num_patches`, `codes`, `positions`, `selection` and `image_size`.

        Returns:
          the header as written, with the number of records and the mean number of tokens per image.
        """
        parts = [np.load(self._file(block, "npz")) for block in range(blocks)]
        joined: dict[str, Any] = {key: np.concatenate([part[key] for part in parts]) for key in parts[0].files}
        contents = hashlib.sha256("".join(joined.pop("digest")).encode()).hexdigest()[:16]
        buffer = io.BytesIO()
        np.savez(buffer, **joined)
        _write_whole(self.path / "index.npz", buffer.getvalue())
        kept = joined["kept"]
        header = self.identity | header
        header |= dict(records=len(kept), blocks=blocks, tokens=round(float(kept.mean()), 4), contents=contents)
        _write_whole(self.path / "header.json", json.dumps(header).encode())
        return header


def _flat(lists: list[list[int]]) -> np.ndarray:
    return np.array([n for row in lists for n in row], np.uint16)


def _lengths(lists: list[list[int]]) -> np.ndarray:
    return np.array([len(row) for row in lists], np.int32)


def _write_whole(file: pathlib.Path, data: bytes) -> None:
    """Writes a file atomically."""
    partial = file.with_name(f"{file.name}.{uuid.uuid4().hex}")
    partial.write_bytes(data)
    partial.rename(file)


class Records:
    """Random access to the records of one split, in a directory that `unimm_jax.pretokenize` wrote.

    Attributes:
      header: contents of `header.json`: fingerprints, shapes and counts.
      text_tokenizer: the tokenizer that counted the texts.
      kept: number of kept patches per record, int32.
      captions, questions: token counts of the captions and of the questions (with answer) of record i, by `[i]`.

    Raises (constructor):
      DataError: the directory holds no finished records, or their files are damaged or of another version.
    """

    def __init__(self, path: str | pathlib.Path):
        self.path = pathlib.Path(path)
        if not (self.path / "header.json").exists():
            raise DataError(f"{path} holds no finished records; write them with python -m unimm_jax.pretokenize")
        try:
            self.header: dict[str, Any] = legacy.header(json.loads((self.path / "header.json").read_text()))
            self.text_tokenizer = TextTokenizer(self.header["text_tokenizer"])
            index = np.load(self.path / "index.npz")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"the records in {path} are damaged ({error}); write them again with python -m unimm_jax.pretokenize"
            ) from None
        if missing := {"kept", "captions", "caption_counts", "questions", "question_counts"} - set(index.files):
            raise DataError(
                f"{path}/index.npz lacks {', '.join(sorted(missing))}: another version of unimm_jax wrote these "
                "records; write them again with python -m unimm_jax.pretokenize"
            )
        self.kept: np.ndarray = index["kept"]
        self.captions = _Ragged(index["captions"], index["caption_counts"])
        self.questions = _Ragged(index["questions"], index["question_counts"])
        self._reader: Any = None
        self._items: dict[int, dict] = {}
        self._images: dict[int, np.ndarray] = {}
        self._small = len(self) * self.header["image_size"] ** 2 * 3 <= CACHE_BYTES  # if so, all of it is cached
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: str | pathlib.Path, split: str = "train") -> "Records":
        """Opens the records of split "train" or "test"; the test split is in the subdirectory `test`.

        Raises:
          DataError: see the class.
        """
        return cls(pathlib.Path(path) / "test" if split == "test" else path)

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{key, image_data (bytes), keep boolean [P], codes int32 [P], captions, questions}; cached, do not modify."""
        if index in self._items:
            return self._items[index]
        with self._lock:
            if self._reader is None:
                from array_record.python.array_record_data_source import ArrayRecordDataSource

                files = [f"{block:06d}.array_record" for block in range(self.header["blocks"])]
                self._reader = ArrayRecordDataSource([str(self.path / "blocks" / name) for name in files])
            item = legacy.record(msgpack.unpackb(self._reader[index]))
        num_patches = self.header["num_patches"]
        item["keep"] = np.unpackbits(np.frombuffer(item["keep"], np.uint8), count=num_patches).astype(bool)
        width = "<u2" if len(item["codes"]) == 2 * item["keep"].sum() else "<u4"
        codes = np.zeros(num_patches, np.int32)
        codes[item["keep"]] = np.frombuffer(item["codes"], width)
        item["codes"] = codes
        if self._small:
            self._items[index] = item
        return item

    def image(self, index: int) -> np.ndarray:
        """The decoded image of a record, uint8 [S, S, 3] with S = header["image_size"]; cached, do not modify."""
        if index in self._images:
            return self._images[index]
        image = transforms.to_pixels(self[index]["image_data"], self.header["image_size"])
        if self._small:
            self._images[index] = image
        return image


class _Ragged:
    """Lists of integers of different lengths, stored in one array."""

    def __init__(self, values: np.ndarray, counts: np.ndarray):
        self.values, self.ends = values.astype(np.int32), np.concatenate([[0], np.cumsum(counts)])

    def __getitem__(self, index: int) -> np.ndarray:
        return self.values[self.ends[index] : self.ends[index + 1]]
