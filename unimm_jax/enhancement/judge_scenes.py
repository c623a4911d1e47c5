"""The exact judge of the embedded scenes: the objects that the detector finds, against those that the prompt names."""

import collections
from collections.abc import Sequence
from typing import Any

import numpy as np

from unimm_jax.data import scenes
from unimm_jax.data.scene_language import Description, Look, describe, parse
from unimm_jax.enhancement.drawings import Drawing
from unimm_jax.enhancement.judges import Judge
from unimm_jax.enhancement.verdicts import Verdict
from unimm_jax.errors import DataError, JudgeError
from unimm_jax.evals.scene_detector import Detection, detect


class SceneJudge(Judge):
    """Judges images of captions and prompts of `data.scenes`."""

    remedy = "it can assess only prompts of the scenes: draw with generate --source=scenes"

    @classmethod
    def open(cls, rest: str) -> "SceneJudge":
        """See `Judge.open`; there are no options."""
        if rest:
            raise DataError(f"the judge scenes has no options, but got {rest[:80]!r}")
        return cls()

    def identity(self) -> dict[str, Any]:
        """See `Judge.identity`."""
        return {"judge": "scenes"}

    def assess(self, drawing: Drawing, image: np.ndarray) -> Verdict:
        """See `Judge.assess`."""
        try:
            wanted = parse(drawing.prompt)
        except DataError as error:
            raise JudgeError("prompt not of the scenes", str(error)) from None
        return verdict_on(wanted, detect(image))


def verdict_on(wanted: Description, found: Sequence[Detection]) -> Verdict:
    """The verdict on an image with the objects `found`. The prompt names all objects, so nothing else may be there.

    object: the shapes are those asked for. count: of each shape there are as many as asked for, and no other object.
    color: the objects of each shape have the colors asked for, as far as there are enough of them; objects beyond the
    number asked for may have any color. False if a shape whose color was asked for is missing.
    spatial: the relation holds between two objects of the looks asked for; True if none is asked for.
    """
    asked = collections.Counter(shape for shape, _ in wanted.objects)
    there = collections.Counter(item.shape for item in found)
    count = len(found) == len(wanted.objects) and all(there[shape] == number for shape, number in asked.items())
    return Verdict(
        seen(found),
        object=set(asked) == set(there),
        count=count,
        color=all(_colors_fit(shape, wanted.objects, found) for shape in asked),
        spatial=wanted.relation is None or _holds(wanted, found),
    )


def _colors_fit(shape: str, looks: Sequence[Look], found: Sequence[Detection]) -> bool:
    """Whether as many objects of a shape as possible have a color that was asked for."""
    wanted = collections.Counter(colour for name, colour in looks if name == shape)
    there = collections.Counter(item.colour for item in found if item.shape == shape)
    if not there:
        return set(wanted) == {None}
    matched = sum(min(number, there[colour]) for colour, number in wanted.items() if colour is not None)
    matched += min(wanted[None], there.total() - matched)
    return matched == min(wanted.total(), there.total())


def _holds(wanted: Description, found: Sequence[Detection]) -> bool:
    first, second = ([item for item in found if _is(item, look)] for look in wanted.objects)
    return any(wanted.relation in between(a, b) for a in first for b in second if a is not b)


def _is(item: Detection, look: Look) -> bool:
    shape, colour = look
    return item.shape == shape and colour in (None, item.colour)


def between(a: Detection, b: Detection) -> tuple[str, ...]:
    """Relations of `a` to `b` by GenEval's rule; see `scenes.offset_relations`."""
    return scenes.offset_relations(b.x - a.x, b.y - a.y, a.width + b.width, a.height + b.height)


def seen(found: Sequence[Detection]) -> str:
    """What is in an image, in the words of the first caption of a scene (`scenes.captions`)."""
    ordered = sorted(found, key=lambda item: (int(item.y * scenes.GRID), item.x))
    looks = [None if item.shape == "?" else (item.shape, item.colour) for item in ordered]
    if len(looks) == 2 and None not in looks and looks[0] != looks[1]:
        for relation in between(*ordered)[:1]:
            return f"{describe(looks[:1])} {scenes.relation_phrase(relation)} {describe(looks[1:])}"
    return describe(looks)
