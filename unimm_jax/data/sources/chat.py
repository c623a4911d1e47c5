"""Chat messages in JSON Lines, as chat APIs take them: text and image parts, images as paths or data URLs."""

import base64
from collections.abc import Iterator
from typing import Any

from unimm_jax.data.outlines import ROLES, Message
from unimm_jax.data.sources.files import PLACEHOLDER, RowSource, as_text, place_images, show, split_placeholders
from unimm_jax.errors import InvalidRecordError

DATA_URL = ("data:image/", ";base64")  # start and end of what is before the comma


class ChatSource(RowSource):
    """Rows {"messages": [{"role": "system", "user" or "assistant", "content": text or list of parts}, …]}.

    Parts are {"type": "text", "text": …}, {"type": "image", "image": …} and {"type": "image_url", "image_url": {"url":
    …}}. An image is a path or a data URL; an image part without one is the next of the row's list "images". If the row
    has such a list, each `<image>` of a content that is one text is its next image, too.
    """

    evaluator = "answers"
    fields = ("messages",)

    def parse(self, row: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """See `RowSource.parse`."""
        given = [] if row.get("images") is None else row["images"]
        if not isinstance(given, list):
            raise InvalidRecordError(f"its images are {type(given).__name__}, not a list of paths")
        messages: list[Message] = []
        images: list[Any] = []
        for number, (role, parts) in enumerate(_messages(row, bool(given)), 1):
            content = place_images(parts, images)
            if not content:
                raise InvalidRecordError(f"message {number} is empty")
            messages.append(Message(role, content))
        pathless = [i for i, image in enumerate(images) if image is None]
        if len(pathless) != len(given):
            raise InvalidRecordError(
                f"its list has {len(given)} images, and {len(pathless)} parts or {PLACEHOLDER} take one from it"
            )
        for i, image in zip(pathless, given, strict=True):
            images[i] = image
        return [_image(image) for image in images], {"messages": messages}


def _messages(row: dict[str, Any], has_placeholders: bool) -> Iterator[tuple[str, list[tuple[bool, Any]]]]:
    """The role of each message and its parts; see `_part`."""
    messages = row.get("messages")
    if not isinstance(messages, list):
        raise InvalidRecordError(f"its messages are {type(messages).__name__}, not a list")
    if not messages:
        raise InvalidRecordError("its messages are an empty list")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise InvalidRecordError(f"message {number} is {type(message).__name__}, not an object")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise InvalidRecordError(f"message {number} has the role {show(role)}; roles are {', '.join(ROLES)}")
        where = f"message {number}"
        if isinstance(content, list):
            yield role, [_part(part, where) for part in content]
        else:
            text = as_text(content, f"content of {where}")
            yield role, split_placeholders(text) if has_placeholders else [(False, text)]


def _part(part: Any, where: str) -> tuple[bool, Any]:
    """A part of a message: whether it is an image, and the text or what names the image (None for the next one)."""
    if not isinstance(part, dict):
        raise InvalidRecordError(f"a part of {where} is {type(part).__name__}, not an object")
    kind = part.get("type")
    if kind == "text":
        return False, as_text(part.get("text"), f"text in {where}")
    if kind == "image":
        return True, part.get("image")
    if kind != "image_url":
        raise InvalidRecordError(f"a part of {where} has the type {show(kind)}; types are text, image and image_url")
    url = part.get("image_url")
    if not isinstance(url, dict) or not isinstance(url.get("url"), str):
        raise InvalidRecordError(f"an image_url of {where} is not an object with a url")
    return True, url["url"]


def _image(image: Any) -> Any:
    """The bytes of an image in a data URL; any other value as it is."""
    if not isinstance(image, str) or not image.startswith("data:"):
        return image
    head, _, data = image.partition(",")
    if not head.startswith(DATA_URL[0]) or not head.endswith(DATA_URL[1]):
        raise InvalidRecordError(f"its image is not a URL of the form data:image/…;base64,…: {show(head)}")
    try:
        decoded = base64.b64decode(data, validate=True)
    except ValueError as error:
        raise InvalidRecordError(f"its image is not base64 ({error})") from None
    if not decoded:
        raise InvalidRecordError("its image is a data URL without data")
    return decoded
