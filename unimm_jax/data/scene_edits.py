"""Edits of scenes: an instruction in one of several wordings, and the scene that it asks for.

An edit refers to its object by the shape, the color, or both, so that no other object of the scene is meant. The
background stays as it is. A test edit starts from a layout of the test split, so that its combination of layout and
instruction does not occur in training.
"""

import dataclasses

import numpy as np

from unimm_jax.data.scenes import COLOURS, GRID, RADII, SHAPES, Scene, SceneObject, draw_scene, noun

KINDS = ("recolor", "reshape", "move", "add", "remove")
MAX_OBJECTS = 4
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

    The kinds of the first edits are equally frequent, and so are those that each later scene allows.

    Args:
      seed, split, index: see `scenes.draw_scene`; the source of the first edit is a scene of the split.
      turns: number of edits, at least 1.

    Raises:
      ValueError: unknown split.
    """
    rng = np.random.default_rng([seed, index, turns, 73])
    kind, attempt = KINDS[rng.integers(len(KINDS))], 0
    while True:
        scene = draw_scene(seed, split, index + attempt * 1_000_003)
        if kind in kinds(scene):
            break
        attempt += 1
    edits = [draw_edit(rng, scene, kind)]
    while len(edits) < turns:
        possible = kinds(edits[-1].target)
        edits.append(draw_edit(rng, edits[-1].target, possible[rng.integers(len(possible))], edits[-1].free))
    return edits


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
    objects = list(scene.objects)
    words: dict[str, str] = {}
    if kind == "add":
        shape, color = SHAPES[rng.integers(len(SHAPES))], list(COLOURS)[rng.integers(len(COLOURS))]
        words["look"] = noun(1, shape, color)
        taken = {_cell(item) for item in objects}
        cells = [(x, y) for y in range(GRID) for x in range(GRID) if (x, y) not in taken]
        x, y = cells[rng.integers(len(cells))]
        free = free | {len(objects)}
        radius = RADII[rng.integers(len(RADII))]
        objects.append(SceneObject(shape, color, radius, (x + 0.5) / GRID, (y + 0.5) / GRID))
    else:
        named = _named(scene)
        place, phrases = named[rng.integers(len(named))]
        item, words["object"] = objects[place], phrases[rng.integers(len(phrases))]
        if kind == "recolor":
            others = [color for color in COLOURS if color != item.colour]
            words["color"] = others[rng.integers(len(others))]
            objects[place] = dataclasses.replace(item, colour=words["color"])
        elif kind == "reshape":
            others = [shape for shape in SHAPES if shape != item.shape]
            shape = others[rng.integers(len(others))]
            words["shape"] = noun(1, shape, None)
            objects[place] = dataclasses.replace(item, shape=shape)
        elif kind == "move":
            corners = _free_corners(scene)
            words["corner"] = corners[rng.integers(len(corners))]
            x, y = CORNERS[words["corner"]]
            objects[place] = dataclasses.replace(item, x=(x + 0.5) / GRID, y=(y + 0.5) / GRID)
            free = free - {place}
        else:
            del objects[place]
            free = frozenset(i - (i > place) for i in free if i != place)
    wording = WORDINGS[kind][rng.integers(len(WORDINGS[kind]))]
    return SceneEdit(kind, wording.format(**words), scene, dataclasses.replace(scene, objects=tuple(objects)), free)


def _cell(item: SceneObject) -> tuple[int, int]:
    return int(item.x * GRID), int(item.y * GRID)


def _free_corners(scene: Scene) -> list[str]:
    taken = {_cell(item) for item in scene.objects}
    return [name for name, cell in CORNERS.items() if cell not in taken]


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
