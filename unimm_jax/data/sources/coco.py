"""Captions in COCO's JSON format."""

import collections
import json
import logging
import pathlib
from typing import Any

from unimm_jax import storage
from unimm_jax.data.sources.files import RowSource, as_text, show
from unimm_jax.errors import DataError, InvalidRecordError


class CocoRows:
    """The images of a COCO captions file by index, each with its captions in order of annotation id.

    Attributes:
      ids: id of each image; None if it is missing, unusable or that of several images.

    Raises (constructor):
      DataError: the file is missing, is not JSON, or has no lists of images and annotations.
    """

    def __init__(self, file: pathlib.Path):
        try:
            data = json.loads(storage.read(file))
        except OSError as error:
            raise DataError(f"{file} cannot be read ({error.strerror})") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file} is not JSON ({error})") from None
        if not isinstance(data, dict) or not all(isinstance(data.get(n), list) for n in ("images", "annotations")):
            raise DataError(f"{file} is not a COCO captions file: it needs the lists images and annotations")
        if not data["images"]:
            raise DataError(f"{file} has no images")
        self.images: list[Any] = data["images"]
        ids = [_id(image, "id") for image in self.images]
        counts = collections.Counter(ids)
        self.ids = [None if counts[i] > 1 else i for i in ids]
        self.captions: dict[str | None, list[Any]] = {i: [] for i in self.ids if i is not None}
        known = [a for a in data["annotations"] if _id(a, "image_id") in counts and _id(a, "image_id") is not None]
        for annotation in sorted(known, key=_order):
            self.captions.get(_id(annotation, "image_id"), []).append(annotation.get("caption"))
        if ignored := len(data["annotations"]) - len(known):
            logging.warning("%s: ignored %d annotations that belong to none of its images", file, ignored)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self.images[index]
        if not isinstance(image, dict):
            raise InvalidRecordError(f"images[{index}] is {type(image).__name__}, not an object")
        if self.ids[index] is None:
            raise InvalidRecordError(f"images[{index}] has no id of its own: {show(image.get('id'))}")
        return {"file_name": image.get("file_name"), "captions": self.captions[self.ids[index]]}


class CocoSource(RowSource):
    """{"images": [{"id", "file_name"}, …], "annotations": [{"id", "image_id", "caption"}, …]}: a record per image."""

    rows: CocoRows

    def read(self) -> CocoRows:
        """See `RowSource.read`."""
        return CocoRows(self.file)

    def parse(self, row: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """See `RowSource.parse`."""
        captions = [as_text(caption, "caption").strip() for caption in row["captions"]]
        if not captions:
            raise InvalidRecordError("it has no caption")
        if not any(captions):
            raise InvalidRecordError("its caption is empty")
        return [as_text(row["file_name"], "file_name")], {"captions": [caption for caption in captions if caption]}

    def key(self, index: int) -> str:
        """See `Source.key`. Ends with the id of the image, so that a part of a data set keeps its held-out split."""
        image = self.rows.ids[index]
        return f"{self.file.name}[{index}]" if image is None else f"{self.file.name}/{image}"


def _id(row: Any, name: str) -> str | None:
    """The id of an image as text, or None if the row has no usable one."""
    value = row.get(name) if isinstance(row, dict) else None
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    try:
        return as_text(value, name) or None
    except InvalidRecordError:
        return None


def _order(annotation: dict[str, Any]) -> tuple[bool, int]:
    """Sorts annotations by id; those without an integer id are last, in the order of the file."""
    value = annotation.get("id")
    return (False, value) if isinstance(value, int) else (True, 0)
