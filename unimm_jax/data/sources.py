"""Where pictures and texts come from: the embedded scenes, a folder, a TFDS directory. Random access throughout."""

import collections
import logging
import pathlib
import threading
from typing import Any, Protocol, TypedDict

import numpy as np

from unimm_jax.data import scenes, transforms
from unimm_jax.data.transforms import BadRecord

PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
CACHE_BYTES = 2_000_000_000  # decoded pictures kept in memory, if all of a source's fit


class Record(TypedDict):
    """One picture (encoded bytes, or pixels uint8 [H, W, 3]) with its texts; questions are (question, answer, kind)."""

    key: str
    picture: bytes | np.ndarray
    captions: list[str]
    questions: list[tuple[str, str, str]]


class Source(Protocol):
    """Random access to records. `__getitem__` raises `BadRecord` for one that cannot be used."""

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


class SceneSource:
    """The embedded scenes (`unimm_jax.data.scenes`)."""

    def __init__(self, split: str = "train", count: int = 12000, seed: int = 0, jitter: float = 1.0, size: int = 64):
        self.name = f"scenes:{split}"
        self.split, self.count, self.seed, self.jitter, self.size = split, count, seed, jitter, size

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Record:
        scene = scenes.draw_scene(self.seed, self.split, index, self.jitter)
        return Record(
            key=f"{self.name}/{index}",
            picture=scenes.render(scene, self.size),
            captions=scenes.captions(scene),
            questions=scenes.questions(scene),
        )


class FolderSource:
    """Pictures with a `.txt` of the same name beside them, one caption a line, subfolders included."""

    def __init__(self, path: str):
        self.name = path
        self.files = sorted(f for f in pathlib.Path(path).rglob("*") if f.suffix.lower() in PICTURE_SUFFIXES)
        if not self.files:
            raise ValueError(f"{path} holds no pictures ({', '.join(sorted(PICTURE_SUFFIXES))})")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Record:
        file = self.files[index]
        text = file.with_suffix(".txt")
        try:
            lines = text.read_bytes().decode("utf-8").splitlines()
        except FileNotFoundError:
            raise BadRecord(f"no caption file {text.name} beside it") from None
        except UnicodeDecodeError as error:
            raise BadRecord(f"its caption is not UTF-8 text ({error.reason} at byte {error.start})") from error
        captions = [line.strip() for line in lines if line.strip()]
        if not captions:
            raise BadRecord("its caption is empty")
        return Record(key=str(file), picture=file.read_bytes(), captions=captions, questions=[])


class TfdsSource:
    """A prepared TFDS data set in ArrayRecord format, read as a data source (no TensorFlow).

    The features must hold an image ("image") and a text ("caption", "text" or "captions").
    """

    def __init__(self, path: str, split: str = "train"):
        import tensorflow_datasets as tfds

        self.name = path
        builder = tfds.builder_from_directory(path)
        if split not in builder.info.splits:
            raise ValueError(f"{path} has no split {split!r}; it has {sorted(builder.info.splits)}")
        try:
            skip = {"image": tfds.decode.SkipDecoding()}
            self.data: Any = builder.as_data_source(split=split, decoders=skip)
        except NotImplementedError as error:
            raise ValueError(
                f"{path} is not in ArrayRecord format; prepare it with file_format='array_record'"
            ) from error
        fields = set(builder.info.features)
        self.text = next((f for f in ("captions", "caption", "text") if f in fields), None)
        if "image" not in fields or self.text is None:
            raise ValueError(
                f"{path} needs the features image and caption (or captions, text); it has {sorted(fields)}"
            )

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Record:
        item = self.data[index]
        texts = item[self.text]
        texts = [texts] if isinstance(texts, str | bytes) else list(np.atleast_1d(texts))
        try:
            captions = [(t.decode("utf-8") if isinstance(t, bytes) else str(t)).strip() for t in texts]
        except UnicodeDecodeError as error:
            raise BadRecord(f"its caption is not UTF-8 text ({error.reason})") from error
        captions = [c for c in captions if c]
        if not captions:
            raise BadRecord("its caption is empty")
        return Record(key=f"{self.name}/{index}", picture=item["image"], captions=captions, questions=[])


def open_source(spec: str, split: str = "train") -> Source:
    """Opens one source by its description.

    Args:
      spec: "scenes" or "scenes:count=2000,seed=1,jitter=9", a folder of pictures, or a TFDS directory.
      split: "train" or "test"; a folder has one split only.

    Raises:
      ValueError: nothing of the kind there; the message says what was looked for.
    """
    if spec == "scenes" or spec.startswith("scenes:"):
        options: dict[str, Any] = {}
        for item in filter(None, spec.partition(":")[2].split(",")):
            name, _, value = item.partition("=")
            if name not in ("count", "seed", "jitter", "size"):
                raise ValueError(f"scenes has no option {name!r}; it has count, seed, jitter and size")
            options[name] = float(value) if name == "jitter" else int(value)
        return SceneSource(split, **options)
    path = pathlib.Path(spec).expanduser()
    if not path.exists():
        raise ValueError(f"data source {spec!r} is neither 'scenes' nor an existing folder")
    if (path / "dataset_info.json").exists():
        return TfdsSource(str(path), split)
    if path.is_dir():
        return FolderSource(str(path))
    raise ValueError(f"data source {spec!r} is a file; give the folder that holds the pictures or the TFDS data set")


class Pictures:
    """A source whose records are decoded, resized and safe: index → {image uint8 [S, S, 3], captions, …}.

    A bad record is named once in the log, counted in `bad`, and the next usable one stands in for it, so the order of
    data stays a function of the index.

    Raises (constructor):
      ValueError: not one usable record; the reasons are counted.
    """

    def __init__(self, source: Source, size: int):
        self.source, self.size = source, size
        self.bad: dict[int, str] = {}
        self._cache: dict[int, dict] | None = {} if len(source) * size * size * 3 <= CACHE_BYTES else None
        self._lock = threading.Lock()
        if not any(self.load(i) is not None for i in range(len(source))):
            reasons = collections.Counter(reason.split(":")[0] for reason in self.bad.values())
            listed = "; ".join(f"{n} × {reason}" for reason, n in reasons.most_common(5))
            raise ValueError(f"{source.name} has no usable record among {len(source)}: {listed}")

    def __len__(self) -> int:
        return len(self.source)

    def load(self, index: int) -> dict | None:
        """The record at `index` itself, or None where it is bad."""
        if index in self.bad:
            return None
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        try:
            record = self.source[index]
            image = transforms.to_pixels(record["picture"], self.size)
            item = {**record, "image": image}
        except BadRecord as error:
            with self._lock:
                if index not in self.bad:
                    self.bad[index] = str(error)
                    name = self.source.files[index] if isinstance(self.source, FolderSource) else index
                    logging.warning("skipped %s: %s", name, error)
            return None
        if self._cache is not None:
            self._cache[index] = item
        return item

    def __getitem__(self, index: int) -> dict:
        for shift in range(len(self.source)):
            item = self.load((index + shift) % len(self.source))
            if item is not None:
                return item
        raise ValueError(f"{self.source.name} has no usable record left")

    def __getstate__(self) -> dict:
        state = self.__dict__.copy()
        state.pop("_lock")
        state["_cache"] = None if self._cache is None else {}
        return state

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()
