"""A prepared TFDS data set in ArrayRecord format, read without TensorFlow."""

from typing import Any

import numpy as np

from unimm_jax import storage
from unimm_jax.data.outlines import Record
from unimm_jax.data.remote_blocks import RemoteBlocks
from unimm_jax.data.sources.base import fingerprint_files
from unimm_jax.errors import DataError, InvalidRecordError

TEXT_FEATURES = ("captions", "caption", "text")


class TfdsSource:
    """One split of a TFDS data set with the features "image" and one of "captions", "caption" and "text".

    On an object store, the files of the data set are copied to the cache as they are read.

    Raises (constructor):
      DataError: not a prepared data set, not in ArrayRecord format, no split "train", or other features.
    """

    evaluator = "captions"

    def __init__(self, path: str, split: str = "train"):
        import tensorflow_datasets as tfds

        self.name, self.root = path, storage.path(path)
        if not storage.kind(self.root / "dataset_info.json"):
            raise DataError(f"{path} is not a prepared TFDS data set: it has no dataset_info.json")
        try:
            builder = tfds.builder_from_directory(str(self.root))
        except Exception as error:  # damaged metadata raise many types
            raise DataError(f"{path} is not a prepared TFDS data set: {str(error).splitlines()[0]}") from None
        has = set(builder.info.splits)
        self.splits = tuple(s for s in ("train", "test") if s in has)
        if "train" not in has:
            raise DataError(f"{path} has no split 'train'; it has {sorted(has)}")
        used = split if split in has else "train"
        if builder.info.file_format.value != "array_record":
            raise DataError(f"{path} is not in ArrayRecord format; prepare it with file_format='array_record'")
        skip = {"image": tfds.decode.SkipDecoding()}
        self.data: Any
        if storage.is_remote(self.root):
            info = builder.info.splits[used]
            blocks = RemoteBlocks([storage.path(file) for file in info.filepaths], info.shard_lengths)
            self.data = _Examples(blocks, builder.info.features, skip)
        else:
            self.data = builder.as_data_source(split=used, decoders=skip)
        fields = set(builder.info.features)
        self.text = next((f for f in TEXT_FEATURES if f in fields), None)
        if "image" not in fields or self.text is None:
            raise DataError(f"{path} needs the features image and caption (or captions, text); it has {sorted(fields)}")

    @classmethod
    def open(cls, path: str, split: str) -> "TfdsSource":
        """Opens a split, or "train" if the data set does not have it (see `open_source`).

        Raises:
          DataError: see the class.
        """
        return cls(path, split)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Record:
        item = self.data[index]
        texts = item[self.text]
        texts = [texts] if isinstance(texts, str | bytes) else list(np.atleast_1d(texts))
        try:
            captions = [(t.decode("utf-8") if isinstance(t, bytes) else str(t)).strip() for t in texts]
        except UnicodeDecodeError as error:
            raise InvalidRecordError(f"its caption is not UTF-8 text ({error.reason})") from error
        captions = [c for c in captions if c]
        if not captions:
            raise InvalidRecordError("its caption is empty")
        return Record(self.key(index), (item["image"],), captions=captions)

    def key(self, index: int) -> str:
        """See `Source.key`."""
        return f"tfds/{index}"  # without the path, so that a moved data set keeps its held-out split

    def fingerprint(self) -> str:
        """See `Source.fingerprint`."""
        names = storage.children(self.root)
        return fingerprint_files(self.root, [self.root / name for name in sorted(names) if not names[name]])


class _Examples:
    """The examples in blocks on an object store."""

    def __init__(self, blocks: RemoteBlocks, features: Any, decoders: dict[str, Any]):
        self.blocks, self.features, self.decoders = blocks, features, decoders

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> Any:
        return self.features.deserialize_example_np(self.blocks[index], decoders=self.decoders)
