"""Reads and writes the captions of scenes: from a text to the objects that it names, and from objects to a text."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from unimm_jax.data import scenes
from unimm_jax.errors import DataError

_SINGULAR = {plural: shape for shape, plural in scenes.PLURALS.items()}
_NOUN = re.compile(
    rf"(?:(?P<one>an?)|(?P<number>{'|'.join(scenes.NUMBERS[2:])}))(?: (?P<colour>{'|'.join(scenes.COLOURS)}))?"
    rf" (?P<name>{'|'.join([*scenes.SHAPES, *_SINGULAR])})"
)
_RELATION = re.compile(rf"(.+) ({'|'.join(map(scenes.relation_phrase, scenes.RELATIONS))}) (.+)")

Look = tuple[str, str | None]  # shape, and color if it is given


class Description(NamedTuple):
    """What a caption or prompt of a scene says.

    Attributes:
      objects: shape and color (None if it is not said) of every object, in the order of the text.
      relation: of the first object to the second, a name of `scenes.RELATIONS`, or None.
    """

    objects: tuple[Look, ...]
    relation: str | None = None


def parse(text: str) -> Description:
    """Reads a text of `scenes.captions` or `scenes.draw_prompt`.

    Raises:
      DataError: another text.
    """
    match = _RELATION.fullmatch(text)
    if match is None:
        looks = [_looks(phrase, text) for phrase in re.split(", | and ", text)]
        return Description(tuple(look for group in looks for look in group))
    first, second = _looks(match[1], text), _looks(match[3], text)
    if len(first) != 1 or len(second) != 1:
        raise DataError(f"{text[:200]!r} is not a caption or prompt of the scenes: a relation is between two objects")
    relation = next(name for name in scenes.RELATIONS if scenes.relation_phrase(name) == match[2])
    return Description(first + second, relation)


def _looks(phrase: str, text: str) -> tuple[Look, ...]:
    """The objects of a noun phrase such as "two red circles"."""
    match = _NOUN.fullmatch(phrase)
    if match is None or (match["name"] in _SINGULAR) != (match["number"] is not None):
        raise DataError(f"{text[:200]!r} is not a caption or prompt of the scenes: it has {phrase[:80]!r}")
    count = 1 if match["one"] else scenes.NUMBERS.index(match["number"])
    return ((_SINGULAR.get(match["name"], match["name"]), match["colour"]),) * count


def describe(looks: Sequence[Look | None]) -> str:
    """Objects in the words of a caption. Equal objects are counted together, in the order of their first one.

    Args:
      looks: of each object; None is an object without a known shape.

    Returns:
      for example "two red circles and something unclear", or "nothing".
    """
    counts: dict[Look | None, int] = {}
    for look in looks:
        counts[look] = counts.get(look, 0) + 1
    parts = [_phrase(look, count) for look, count in counts.items()]
    return " and ".join([*([", ".join(parts[:-1])] if len(parts) > 1 else []), *parts[-1:]]) or "nothing"


def _phrase(look: Look | None, count: int) -> str:
    if look is None:
        return "something unclear"
    shape, colour = look
    if count < len(scenes.NUMBERS):
        return scenes.noun(count, shape, colour)
    return " ".join(["many", *([colour] if colour else []), scenes.PLURALS[shape]])
