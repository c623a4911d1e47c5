"""Documents of texts and images in order, in JSON Lines with the fields of MMC4 or of OBELICS."""

from typing import Any

from unimm_jax.data.sources.files import RowSource, as_text, place_images, show
from unimm_jax.errors import InvalidRecordError


class InterleavedSource(RowSource):
    """Rows of one of two shapes.

    MMC4: {"text_list": [text, …], "image_info": [{"image_name": path, "matched_text_index": k}, …]}; an image goes
    before the text that it matches. OBELICS: {"images": [path or null, …], "texts": [text or null, …]}, of the same
    length, with one of both at each place.
    """

    evaluator = ""
    fields = ("text_list", "texts")

    def parse(self, row: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """See `RowSource.parse`."""
        if "text_list" in row:
            parts = _mmc4(_list(row, "text_list"), _list(row, "image_info"))
        elif "texts" in row:
            parts = _obelics(_list(row, "images"), _list(row, "texts"))
        else:
            raise InvalidRecordError("it has neither text_list and image_info nor images and texts")
        images: list[Any] = []
        content = place_images(parts, images)
        if not content:
            raise InvalidRecordError("it has no text and no image")
        return images, {"content": content}


def _mmc4(texts: list[Any], infos: list[Any]) -> list[tuple[bool, Any]]:
    """Parts in order: whether a part is an image, and its text or path."""
    before: list[list[tuple[bool, Any]]] = [[] for _ in texts]
    for i, info in enumerate(infos):
        if not isinstance(info, dict):
            raise InvalidRecordError(f"its image_info[{i}] is {type(info).__name__}, not an object")
        match = info.get("matched_text_index")
        if not isinstance(match, int) or isinstance(match, bool) or not 0 <= match < len(texts):
            raise InvalidRecordError(
                f"the matched_text_index of its image_info[{i}] is {show(match)}, not one of its {len(texts)} texts"
            )
        before[match].append((True, as_text(info.get("image_name"), f"image_info[{i}].image_name")))
    return [part for i, text in enumerate(texts) for part in (*before[i], (False, as_text(text, f"text_list[{i}]")))]


def _obelics(images: list[Any], texts: list[Any]) -> list[tuple[bool, Any]]:
    """As `_mmc4`."""
    if len(images) != len(texts):
        raise InvalidRecordError(f"its images and texts have different lengths: {len(images)} and {len(texts)}")
    parts = []
    for i, (image, text) in enumerate(zip(images, texts, strict=True)):
        if (image is None) == (text is None):
            raise InvalidRecordError(f"its images[{i}] and texts[{i}] are both {'null' if text is None else 'given'}")
        is_image = text is None
        parts.append((is_image, as_text(image, f"images[{i}]") if is_image else as_text(text, f"texts[{i}]")))
    return parts


def _list(row: dict[str, Any], name: str) -> list[Any]:
    value = row.get(name)
    if not isinstance(value, list):
        raise InvalidRecordError(f"its {name} is {type(value).__name__}, not a list")
    return value
