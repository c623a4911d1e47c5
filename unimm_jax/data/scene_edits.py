"""Edits of scenes: an instruction in one of several wordings, and the scene that it asks for.

An edit refers to its object by the shape, the color, or both, so that no other object of the scene is meant. The
background stays as it is. All layouts of an edit, before and after it, are of its split, so that no combination of
layout and instruction is in both.
"""

import collections
import dataclasses
import re

import numpy as np

from unimm_jax.data.scenes import (
    COLOURS,
    GRID,
    RADII,
    SHAPES,
    Scene,
    SceneObject,
    cell,
    cell_center,
    draw_look,
    draw_scene,
    free_cells,
    layout_split,
    noun,
)

KINDS = ("recolor", "reshape", "move", "add", "remove")
MAX_OBJECTS = 4
ATTEMPTS = 20  # edits of a scene until another scene is drawn
CORNERS = {
    "top left corner": (0, 0),
    "top right corner": (GRID - 1, 0),
    "bottom left corner": (0, GRID - 1),
    "bottom right corner": (GRID - 1, GRID - 1),
}
WORDINGS = {
    "recolor": ("make {object} {color}", "paint {object} {color}", "turn {object} {color}"),
    "reshape": ("make {object} {shape}", "turn {object} into {shape}", "change {object} to {shape}"),
    "move": ("move {object} to the {corner}", "put {object} in the {corner}", "place {object} in the {corner}"),
    "add": ("add {look}", "draw {look}", "put in {look}"),
    "remove": ("remove {object}", "delete {object}", "take {object} away"),
}


@dataclasses.dataclass(frozen=True)
class SceneEdit:
    """An edit.

    Attributes:
      kind: a name of `KINDS`. instruction: what is asked for.
      source, target: the scene before and after it.
      free: indices of the target's objects that may be anywhere: added ones, whose place no instruction names.
    """

    kind: str
    instruction: str
    source: Scene
    target: Scene
    free: frozenset[int] = frozenset()


def draw_chain(seed: int, split: str, index: int, turns: int) -> list[SceneEdit]:
    """Samples chain `index` of a split: `turns` edits, each of the result of the one before it.

    The layouts of all scenes of a chain are of the split. No edit leads back to an earlier scene of the chain. The
    kinds of the first edits are equally frequent, and so are those that each later scene allows.

    Args:
      seed, split, index: see `scenes.draw_scene`.
      turns: number of edits, at least 1.

    Raises:
      ValueError: unknown split.
    """
    rng = np.random.default_rng([seed, index, turns, 73])
    kind = KINDS[rng.integers(len(KINDS))]
    while True:
        scene = draw_scene(seed, split, int(rng.integers(2**31)))
        edits: list[SceneEdit] = []
        while len(edits) < turns:
            free = edits[-1].free if edits else frozenset()
            edit = _draw_next(rng, scene, split, "" if edits else kind, free, is_last=len(edits) == turns - 1)
            if edit is None or any(leads_to(edit, earlier.source) for earlier in edits):
                break  # another scene
            edits.append(edit)
            scene = edit.target
        else:
            return edits


def leads_to(edit: SceneEdit, scene: Scene) -> bool:
    """Whether a scene has the objects of an edit's target, in the same cells where the target's are not free."""
    objects = edit.target.objects
    placed = collections.Counter((o.shape, o.colour, cell(o)) for i, o in enumerate(objects) if i not in edit.free)
    there = collections.Counter((o.shape, o.colour, cell(o)) for o in scene.objects)
    looks = [collections.Counter((o.shape, o.colour) for o in found) for found in (objects, scene.objects)]
    return looks[0] == looks[1] and placed <= there


def _draw_next(
    rng: np.random.Generator, scene: Scene, split: str, kind: str, free: frozenset[int], is_last: bool
) -> SceneEdit | None:
    """An edit whose target is of the split and can be edited again, unless it is the last; None if none is found."""
    possible = [name for name in kinds(scene) if name == kind or not kind]
    for _ in range(ATTEMPTS if possible else 0):
        edit = draw_edit(rng, scene, possible[rng.integers(len(possible))], free)
        if layout_split(edit.target.objects) == split and (is_last or kinds(edit.target)):
            return edit
    return None


def kinds(scene: Scene) -> list[str]:
    """The kinds of edits that a scene allows."""
    named = bool(_named(scene))
    allowed = dict(
        recolor=named,
        reshape=named,
        move=named and len(_free_corners(scene)) > 0,
        add=len(scene.objects) < MAX_OBJECTS,
        remove=named and len(scene.objects) > 1,
    )
    return [kind for kind in KINDS if allowed[kind]]


def draw_edit(rng: np.random.Generator, scene: Scene, kind: str, free: frozenset[int] = frozenset()) -> SceneEdit:
    """Samples an edit of a kind that the scene allows.

    Args:
      free: indices of the scene's objects that may be anywhere; see `SceneEdit`.
    """
    objects = scene.objects
    words: dict[str, str] = {}
    changed: SceneObject | None = None
    if kind == "add":
        shape, color = draw_look(rng)
        words["look"] = noun(1, shape, color)
        cells = free_cells(objects)
        x, y = cells[rng.integers(len(cells))]
        radius = RADII[rng.integers(len(RADII))]
        place, changed = len(objects), SceneObject(shape, color, radius, *cell_center(rng, x, y))
    else:
        named = _named(scene)
        place, phrases = named[rng.integers(len(named))]
        item, words["object"] = objects[place], phrases[rng.integers(len(phrases))]
        if kind == "recolor":
            others = [color for color in COLOURS if color != item.colour]
            words["color"] = others[rng.integers(len(others))]
            changed = dataclasses.replace(item, colour=words["color"])
        elif kind == "reshape":
            others = [shape for shape in SHAPES if shape != item.shape]
            shape = others[rng.integers(len(others))]
            words["shape"] = noun(1, shape, None)
            changed = dataclasses.replace(item, shape=shape)
        elif kind == "move":
            corners = _free_corners(scene)
            words["corner"] = corners[rng.integers(len(corners))]
            center = cell_center(rng, *CORNERS[words["corner"]])
            changed = dataclasses.replace(item, x=center[0], y=center[1])
    wording = WORDINGS[kind][rng.integers(len(WORDINGS[kind]))]
    return _edited(kind, wording.format(**words), scene, place, changed, free)


# the words of instructions, as `draw_edit` writes them
_SHAPES = {noun(1, shape, None): shape for shape in SHAPES}
_LOOKS = {noun(1, shape, color): (shape, color) for shape in SHAPES for color in COLOURS}
_WORDS = dict(object=["the [a-z ]+?"], color=COLOURS, shape=_SHAPES, look=_LOOKS, corner=CORNERS)
_GROUPS = {name: f"(?P<{name}>{'|'.join(words)})" for name, words in _WORDS.items()}
_PATTERNS = [(kind, re.compile(wording.format(**_GROUPS))) for kind in KINDS for wording in WORDINGS[kind]]


def read_edit(instruction: str, scene: Scene, free: frozenset[int] = frozenset()) -> SceneEdit | None:
    """The edit that an instruction asks for: the inverse of `draw_edit`.

    A moved object is put at the center of the corner's cell, an added one at that of a cell which no instruction names.

    Args:
      free: see `draw_edit`.

    Returns:
      None if the text is not one of the wordings, or if `draw_edit` would not ask for this in the scene: the phrase
      does not single out an object, nothing would change, the corner is taken, or there are too many or few objects.
    """
    match = next(((kind, found) for kind, pattern in _PATTERNS if (found := pattern.fullmatch(instruction))), None)
    if match is None or match[0] not in kinds(scene):
        return None
    kind, words = match[0], match[1].groupdict()
    if kind == "add":
        x, y = next(place for place in free_cells(scene.objects) if place not in CORNERS.values())
        added = SceneObject(*_LOOKS[words["look"]], RADII[0], (x + 0.5) / GRID, (y + 0.5) / GRID)
        return _edited(kind, instruction, scene, len(scene.objects), added, free)
    place = {phrase: place for place, phrases in _named(scene) for phrase in phrases}.get(words["object"])
    if place is None:
        return None
    item = scene.objects[place]
    changed: SceneObject | None = None
    if kind == "recolor":
        changed = dataclasses.replace(item, colour=words["color"])
    elif kind == "reshape":
        changed = dataclasses.replace(item, shape=_SHAPES[words["shape"]])
    elif kind == "move":
        if words["corner"] not in _free_corners(scene):
            return None
        x, y = CORNERS[words["corner"]]
        changed = dataclasses.replace(item, x=(x + 0.5) / GRID, y=(y + 0.5) / GRID)
    return None if changed == item else _edited(kind, instruction, scene, place, changed, free)


def _edited(
    kind: str, instruction: str, scene: Scene, place: int, changed: SceneObject | None, free: frozenset[int]
) -> SceneEdit:
    """The edit after which `changed` is at a place of the objects; None removes the object there."""
    objects = list(scene.objects)
    objects[place : place + 1] = [] if changed is None else [changed]
    if kind == "add":
        free = free | {place}
    elif kind == "move":
        free = free - {place}
    elif kind == "remove":
        free = frozenset(i - (i > place) for i in free if i != place)
    return SceneEdit(kind, instruction, scene, dataclasses.replace(scene, objects=tuple(objects)), free)


def _free_corners(scene: Scene) -> list[str]:
    taken = {cell(item) for item in scene.objects}
    return [name for name, corner in CORNERS.items() if corner not in taken]


def _named(scene: Scene) -> list[tuple[int, list[str]]]:
    """The objects that a phrase can single out, as (place, phrases)."""
    found = []
    for place, item in enumerate(scene.objects):
        others = [other for i, other in enumerate(scene.objects) if i != place]
        phrases = []
        if all(other.shape != item.shape for other in others):
            phrases.append(f"the {item.shape}")
        if all(other.colour != item.colour for other in others):
            phrases.append(f"the {item.colour} object")
        if all((other.shape, other.colour) != (item.shape, item.colour) for other in others):
            phrases.append(f"the {item.colour} {item.shape}")
        if phrases:
            found.append((place, phrases))
    return found
