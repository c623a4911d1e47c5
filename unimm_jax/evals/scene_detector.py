"""The scenes benchmark: reads generated images back and scores them; needs no network and no learned judge.

Rules: `judge` is GenEval's (superfluous objects are punished in counting only); strict also wants nothing more.
Questions are exact matches, captions a multiset overlap of content words, reconstruction the share of objects found
again with the same shape, color and position. An edit is right if its image shows the target scene and nothing else.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Iterable

import numpy as np
from skimage.measure import label, regionprops

from unimm_jax.data import scenes
from unimm_jax.data.scene_edits import SceneEdit

_GREYS = tuple((g, g, g) for g in (150, 170, 190, 210, 230, 250))
_PALETTE = np.array([*_GREYS, *scenes.COLOURS.values()], np.float32)
_MIN_AREA = 0.006  # of the image, as a share: about half of the smallest object (a cross of the small radius)
_SIZE = scenes.RADII[1] - scenes.RADII[0]  # largest change of a width that counts as none: half of a small to a large
_SHADE = 12  # largest change of the background, in levels of 255, that counts as none


@dataclasses.dataclass(frozen=True)
class Detection:
    """An object found in an image: `x`, `y`, `width`, `height` as shares of the side; shape "?" when none fits."""

    shape: str
    colour: str
    x: float
    y: float
    width: float
    height: float


@functools.cache
def _template(shape: str, height: int, width: int) -> np.ndarray:
    """The shape's mask as it looks in a bounding box of `height` × `width` pixels; boolean."""
    axis = np.linspace(-1.1, 1.1, 221)
    mask = scenes.shape_mask(shape, 1.0, *np.meshgrid(axis, axis))
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    sub = (np.arange(6) + 0.5) / 6
    index = [
        ((np.arange(n)[:, None] + sub).reshape(-1) * size / n).astype(int)
        for n, size in zip((height, width), box.shape)
    ]
    return box[np.ix_(*index)].reshape(height, 6, width, 6).mean((1, 3)) > 0.45


def _classify(mask: np.ndarray) -> str:
    height, width = mask.shape
    if max(height, width) > 1.75 * min(height, width):
        return "?"

    def overlap(name: str) -> float:
        template = _template(name, height, width)
        return float((mask & template).sum() / (mask | template).sum())

    best = max(scenes.SHAPES, key=overlap)
    return best if overlap(best) >= 0.6 else "?"


def detect(image: np.ndarray) -> list[Detection]:
    """Reads an image: nearest palette color per pixel, connected components, shape by template overlap.

    Args:
      image: uint8 [H, W, 3].

    Returns:
      Detections from left to right, without small specks.
    """
    height, width = image.shape[:2]
    distance = ((image.astype(np.float32)[:, :, None] - _PALETTE) ** 2).sum(-1)
    index = distance.argmin(-1)
    names = np.where(index < len(_GREYS), 0, index - len(_GREYS) + 1)
    found = []
    for region in regionprops(label(names, background=0, connectivity=1)):
        if region.area < _MIN_AREA * height * width:
            continue
        top, left, bottom, right = region.bbox
        colour = list(scenes.COLOURS)[names[tuple(region.coords[0])] - 1]
        x, y = (left + right) / 2 / width, (top + bottom) / 2 / height
        shape = _classify(region.image)
        found.append(Detection(shape, colour, x, y, (right - left) / width, (bottom - top) / height))
    return sorted(found, key=lambda d: d.x)


def judge(prompt: scenes.Prompt, found: list[Detection]) -> tuple[bool, bool]:
    """Scores one image: (right by GenEval's rule, right with nothing superfluous)."""
    matches = [[d for d in found if d.shape == s and colour in (None, d.colour)] for s, colour in prompt.objects]
    needed = collections.Counter(prompt.objects)
    right = all(len(m) >= needed[look] for m, look in zip(matches, prompt.objects, strict=True))
    if right and prompt.task == "counting":
        right = len(matches[0]) == len(prompt.objects)
    if right and prompt.relation:
        right = any(
            prompt.relation in scenes.offset_relations(b.x - a.x, b.y - a.y, a.width + b.width, a.height + b.height)
            for a in matches[0]
            for b in matches[1]
        )
    return right, right and len(found) == len(prompt.objects)


def _is_same(item: scenes.SceneObject, found: Detection) -> bool:
    near = max(abs(found.x - item.x), abs(found.y - item.y)) <= 1 / 16
    return near and (found.shape, found.colour) == (item.shape, item.colour)


def objects_right(scene: scenes.Scene, found: list[Detection]) -> int:
    """How many objects of a scene are found again: same shape and color, center within 1/16 of the side."""
    return len(found) - len(_without(scene.objects, found))


def _without(objects: Iterable[scenes.SceneObject], found: list[Detection]) -> list[Detection]:
    """The detections that are none of the objects."""
    left = list(found)
    for item in objects:
        hit = next((d for d in left if _is_same(item, d)), None)
        if hit:
            left.remove(hit)
    return left


def edit_right(edit: SceneEdit, found: list[Detection]) -> bool:
    """Whether an image shows every object of the edit's target, and nothing else."""
    objects = edit.target.objects
    placed = [item for i, item in enumerate(objects) if i not in edit.free]
    left = _without(placed, found)
    rest = collections.Counter((objects[i].shape, objects[i].colour) for i in edit.free)
    return len(found) - len(left) == len(placed) and collections.Counter((d.shape, d.colour) for d in left) == rest


def edit_exact(edit: SceneEdit, image: np.ndarray) -> bool:
    """Whether an edit is right, the other objects keep their size, and the background keeps its color.

    Args:
      image: uint8 [S, S, 3].
    """
    target = scenes.render(edit.target, len(image))
    found, wanted = detect(image), detect(target)
    if not edit_right(edit, found):
        return False
    for item in (item for i, item in enumerate(edit.target.objects) if i not in edit.free):
        here = next(d for d in found if _is_same(item, d))
        there = _nearest(wanted, item)  # whatever its shape looks like
        if max(abs(here.width - there.width), abs(here.height - there.height)) > _SIZE:
            return False
    shades = [np.median(pixels, axis=(0, 1)) for pixels in (image, target)]  # objects cover less than half
    return bool(np.abs(shades[0] - shades[1]).max() <= _SHADE)


def _nearest(found: list[Detection], item: scenes.SceneObject) -> Detection:
    return min(found, key=lambda d: math.hypot(d.x - item.x, d.y - item.y))


def looks_right(scene: scenes.Scene, found: list[Detection]) -> bool:
    """Whether an image shows the objects of a scene, wherever they are, and nothing else."""
    return collections.Counter((d.shape, d.colour) for d in found) == collections.Counter(
        (item.shape, item.colour) for item in scene.objects
    )


def content_words(text: str) -> collections.Counter:
    """The words that carry content: numbers ("a" and "an" count as one), colors, shapes in the singular."""
    singular = {plural: name for name, plural in scenes.PLURALS.items()}
    words = [singular.get(w, "one" if w in ("a", "an") else w) for w in text.lower().replace(",", " ").split()]
    return collections.Counter(w for w in words if w in (*scenes.NUMBERS, *scenes.COLOURS, *scenes.SHAPES))


def caption_score(caption: str, truth: str) -> float:
    """Number of right content words as a share of the longer caption's, so that superfluous words cost, too."""
    a, b = content_words(caption), content_words(truth)
    return sum((a & b).values()) / max(sum(a.values()), sum(b.values()), 1)


def question_set(seed: int, per_kind: int, jitter: float = 1.0) -> list[tuple[int, str, str, str]]:
    """The question set: `per_kind` of each kind as (test scene index, question, answer, kind).

    Existence is half yes and half no exactly.
    """
    quota = {kind: per_kind for kind in scenes.QUESTION_KINDS if kind != "existence"}
    quota |= {"yes": per_kind - per_kind // 2, "no": per_kind // 2}
    chosen, index = [], 0
    while any(quota.values()):
        for question, answer, kind in scenes.questions(scenes.draw_scene(seed, "test", index, jitter)):
            slot = answer if kind == "existence" else kind
            if quota[slot]:
                quota[slot] -= 1
                chosen.append((index, question, answer, kind))
        index += 1
    return chosen
