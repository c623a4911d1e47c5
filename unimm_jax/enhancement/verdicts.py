"""Verdicts on generated images: the four categories of ILLUME, and the text that the model learns to write.

The layout of ILLUME's assessments is not published; `docs/decisions.md` says why it is as it is here.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, TypeGuard

from unimm_jax.errors import DataError

CATEGORIES = ("object", "count", "color", "spatial")
SPELLINGS = {"count": ("count", "counting"), "color": ("color", "colour")}  # in JSON
MAX_TOKENS = 96  # of the text of a verdict that a model writes
CORRECTION = "draw it again"  # the user turn that asks for the correction of a bad image
_CATEGORIES = ", ".join(rf"{name} (?P<{name}>yes|no)" for name in CATEGORIES)
_TEXT = re.compile(rf"(?:(?P<seen>.*)\. )?{_CATEGORIES}, overall (?P<overall>yes|no)\.?", re.IGNORECASE)


def question(prompt: str) -> str:
    """The user turn after a drawn image: whether it shows what its prompt says. A final period is dropped."""
    return f"does the image show {prompt.rstrip(' .')}?"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a judge says about an image that was drawn for a prompt.

    Attributes:
      seen: what is in the image, in the words of a caption; spaces are single, and a final period is dropped.
      object, count, color, spatial: whether the image fits the prompt in this category.
      reasons: category → a short reason. They are kept in the verdicts; the model does not learn them.
    """

    seen: str
    object: bool
    count: bool
    color: bool
    spatial: bool
    reasons: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        object.__setattr__(self, "seen", " ".join(self.seen.split()).rstrip(" ."))

    def category(self, name: str) -> bool:
        """Whether the image fits in a category of `CATEGORIES`."""
        return bool(getattr(self, name))

    @property
    def good(self) -> bool:
        """Whether the image fits in all four categories."""
        return all(map(self.category, CATEGORIES))

    @property
    def number_right(self) -> int:
        """The number of categories in which the image fits."""
        return sum(map(self.category, CATEGORIES))

    def to_text(self) -> str:
        """What the model learns: "a red circle. object yes, count no, color yes, spatial yes, overall no".

        The analysis is first, so that the model writes its verdict after what it has seen.
        """
        found = [f"{name} {_word(self.category(name))}" for name in CATEGORIES]
        ending = ", ".join([*found, f"overall {_word(self.good)}"])
        return f"{self.seen}. {ending}" if self.seen else ending

    def to_json(self) -> dict[str, Any]:
        """The form that `from_json` reads."""
        found = {name: {"ok": self.category(name), "reason": self.reasons.get(name, "")} for name in CATEGORIES}
        return {"seen": self.seen, **found}


def from_text(text: str) -> Verdict | None:
    """The verdict in a text of the form of `Verdict.to_text`, or None.

    Upper case, further spaces and a final period are accepted. An overall verdict that contradicts the categories is
    not.
    """
    match = _TEXT.fullmatch(" ".join(text.split()))
    if match is None:
        return None
    flags = {name: match[name].lower() == "yes" for name in CATEGORIES}
    verdict = Verdict(match["seen"] or "", flags["object"], flags["count"], flags["color"], flags["spatial"])
    return verdict if _word(verdict.good) == match["overall"].lower() else None


def from_json(value: Any) -> Verdict:
    """A verdict from JSON: {"seen": text, "object": {"ok": true, "reason": text}, "count": …, …}.

    A category may also be true or false alone; "counting" and "colour" are accepted. Other keys are ignored.

    Raises:
      DataError: something is missing or of another type; the message names all of it.
    """
    if not isinstance(value, dict):
        raise DataError(f"a verdict is {type(value).__name__}, not an object")
    wrong, found, reasons = [], {}, {}
    seen = value.get("seen")
    if not _is_text(seen) or not seen.strip(" .\t\n"):
        wrong.append("seen (a text)")
    for name in CATEGORIES:
        entry = next((value[key] for key in SPELLINGS.get(name, (name,)) if key in value), None)
        said, reason = (entry.get("ok"), entry.get("reason")) if isinstance(entry, dict) else (entry, None)
        if not isinstance(said, bool) or not (reason is None or _is_text(reason)):
            wrong.append(f"{name} (true or false)")
            continue
        found[name] = said
        if reason:
            reasons[name] = reason
    if wrong:
        raise DataError(f"a verdict has no {', no '.join(wrong)}")
    return Verdict(str(seen), **found, reasons=reasons)


def _is_text(value: Any) -> TypeGuard[str]:
    """Whether a value is a text without half a character: JSON can have one half of a pair, UTF-8 cannot."""
    return isinstance(value, str) and value.encode(errors="ignore").decode() == value


def _word(flag: bool) -> str:
    return "yes" if flag else "no"
