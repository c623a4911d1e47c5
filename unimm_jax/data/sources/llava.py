"""LLaVA's conversations in a JSON list or JSON Lines file, also with images to generate (ILLUME+'s editing rows)."""

from collections.abc import Iterator
from typing import Any

from unimm_jax.data.outlines import Message
from unimm_jax.data.sources.files import PLACEHOLDER, RowSource, as_text, place_images, show, split_placeholders
from unimm_jax.errors import InvalidRecordError

ROLES = {"system": "system", "human": "user", "gpt": "assistant"}  # "from" of a turn → role


class LlavaSource(RowSource):
    """Rows {"image": path or list of paths, "conversations": [{"from": "human" or "gpt", "value": text}, …]}.

    The paths may also be in "images"; rows of text only have neither. Each `<image>` in a value is the next image: one
    to read in a human turn, one to generate in a gpt turn. The first turn may be from "system".
    """

    evaluator = "answers"
    fields = ("conversations",)

    def parse(self, row: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """See `RowSource.parse`."""
        images = _images(row)
        messages: list[Message] = []
        used: list[None] = []  # one per image
        for number, (who, value) in enumerate(_turns(row), 1):
            content = place_images(split_placeholders(value), used)
            if not content:
                raise InvalidRecordError(f"turn {number} of its conversations is empty")
            messages.append(Message(ROLES[who], content))
        if len(images) == 1 and not used:
            raise InvalidRecordError(f"it has 1 image and no {PLACEHOLDER} that says where it belongs")
        if len(used) != len(images):
            raise InvalidRecordError(f"it has {len(images)} images and {len(used)} {PLACEHOLDER}")
        return images, {"messages": messages}


def _images(row: dict[str, Any]) -> list[Any]:
    """The paths of the images of a row; not checked one by one."""
    present = [name for name in ("image", "images") if row.get(name) is not None]
    if len(present) == 2:
        raise InvalidRecordError("it has both image and images")
    value = row[present[0]] if present else []
    if not isinstance(value, str | list):
        raise InvalidRecordError(f"its {present[0]} is {type(value).__name__}, not a path or a list of paths")
    return [value] if isinstance(value, str) else value


def _turns(row: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """ "from" and "value" of each turn, human and gpt in turns."""
    turns = row.get("conversations")
    if not isinstance(turns, list):
        raise InvalidRecordError(f"its conversations are {type(turns).__name__}, not a list")
    if not turns:
        raise InvalidRecordError("its conversations are an empty list")
    said = 0  # turns by human and gpt
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise InvalidRecordError(f"turn {number} of its conversations is {type(turn).__name__}, not an object")
        who = turn.get("from")
        if not isinstance(who, str) or who not in ROLES:
            raise InvalidRecordError(f"turn {number} is from {show(who)}; it must be human, gpt or system")
        expected = ("human", "gpt")[said % 2]
        if who != expected and not (who == "system" and number == 1):
            raise InvalidRecordError(f"turn {number} is from {who}, not {expected}: human and gpt must alternate")
        said += who != "system"
        yield who, as_text(turn.get("value"), f"value of turn {number}")
