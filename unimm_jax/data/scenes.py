"""The embedded data set: procedural images of colored shapes, with captions and questions.

A scene is a function of (seed, split, index, placement difficulty), so nothing is downloaded or stored. Captions,
prompts and questions follow two published protocols: the six text-to-image tasks of GenEval (single object, two
objects, counting, colors, position, color attribution) and POPE's existence questions (half yes, half no, with
adversarial negatives). `unimm_jax.evals.scenes` detects the objects in generated images and scores them.
"""

import dataclasses
import functools
import zlib
from collections.abc import Iterable

import numpy as np

SHAPES = ("circle", "square", "triangle", "cross")
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
COLOURS = {
    "red": (220, 35, 35),
    "green": (35, 150, 55),
    "blue": (40, 70, 215),
    "yellow": (240, 215, 45),
    "orange": (240, 130, 30),
    "purple": (145, 45, 165),
    "cyan": (50, 200, 220),
    "black": (20, 20, 20),
}
NUMBERS = ("zero", "one", "two", "three", "four")
RELATIONS = ("left", "right", "above", "below")
TASKS = ("single_object", "two_objects", "counting", "colours", "position", "colour_attribution")
QUESTION_KINDS = ("existence", "count", "colour", "shape", "position")
SPLITS = ("train", "test")

GRID = 4  # cells per side; with the default placement each object is near the center of a cell
RADII = (0.078, 0.1)  # object radius as a fraction of the image side: small, large
TEST_SHARE = 8  # one layout in `TEST_SHARE` belongs to the test split


@dataclasses.dataclass(frozen=True)
class SceneObject:
    """One object. `x`, `y` (center) and `radius` are fractions of the image side; y points down."""

    shape: str
    colour: str
    radius: float
    x: float
    y: float


@dataclasses.dataclass(frozen=True)
class Scene:
    """Content of an image. `kind` is "single", "two", "count" or "mixed"; `background_seed` seeds the background."""

    kind: str
    objects: tuple[SceneObject, ...]
    background_seed: int


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A text-to-image test item.

    Attributes:
      task: a name of `TASKS`.
      text: the prompt.
      objects: required objects as (shape, colour or None).
      relation: required relation of the first object to the second, a name of `RELATIONS`, or None.
    """

    task: str
    text: str
    objects: tuple[tuple[str, str | None], ...]
    relation: str | None = None


def draw_scene(seed: int, split: str, index: int, jitter: float = 1.0) -> Scene:
    """Samples scene `index` of a split.

    Args:
      seed: data set seed.
      split: "train" or "test". A layout (the objects and their cells) belongs to one split only.
      index: index of the scene.
      jitter: placement difficulty. Objects are at cell centers, shifted by up to jitter/64 of the image side in each
        axis. Above 4 they are anywhere in the image where they do not touch.

    Raises:
      ValueError: unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"scenes has the splits {SPLITS}, not {split!r}")
    rng = np.random.default_rng([seed, SPLITS.index(split), index, 71])
    while True:
        kind, objects = _draw_layout(rng, jitter)
        if layout_split(objects) == split:
            return Scene(kind, tuple(objects), int(rng.integers(2**31)))


def scaled(scene: Scene, scale: float) -> Scene:
    """A scene whose objects have `scale` times the radius, at the same places."""
    objects = tuple(dataclasses.replace(item, radius=item.radius * scale) for item in scene.objects)
    return dataclasses.replace(scene, objects=objects)


def cell(item: SceneObject) -> tuple[int, int]:
    """The cell that an object is in: (column, row)."""
    return int(item.x * GRID), int(item.y * GRID)


def draw_look(rng: np.random.Generator) -> tuple[str, str]:
    """A shape and a color; all are equally likely."""
    return SHAPES[rng.integers(len(SHAPES))], list(COLOURS)[rng.integers(len(COLOURS))]


def free_cells(objects: Iterable[SceneObject]) -> list[tuple[int, int]]:
    """The cells without an object, (column, row) in raster order."""
    taken = {cell(item) for item in objects}
    return [(x, y) for y in range(GRID) for x in range(GRID) if (x, y) not in taken]


def layout_split(objects: Iterable[SceneObject]) -> str:
    """The split of a layout (the objects and their cells), by its hash."""
    cells = sorted((o.shape, o.colour, *cell(o)) for o in objects)
    return "test" if zlib.crc32(repr(cells).encode()) % TEST_SHARE == 0 else "train"


def _draw_layout(rng: np.random.Generator, jitter: float) -> tuple[str, list[SceneObject]]:
    kind = ("single", "two", "count", "mixed")[int(np.searchsorted((0.25, 0.60, 0.85), rng.random(), side="right"))]

    if kind == "single":
        looks = [draw_look(rng)]
    elif kind == "two":
        looks = [draw_look(rng), draw_look(rng)]
        while looks[0] == looks[1]:
            looks[1] = draw_look(rng)
    elif kind == "count":
        looks = [draw_look(rng)] * int(rng.integers(2, 5))
    else:
        looks = [draw_look(rng) for _ in range(int(rng.integers(3, 5)))]
    radii = [RADII[rng.integers(2)] for _ in looks]
    centers = _sample_centers(rng, radii, jitter)
    return kind, [SceneObject(s, c, r, x, y) for (s, c), r, (x, y) in zip(looks, radii, centers, strict=True)]


def _sample_centers(rng: np.random.Generator, radii: list[float], jitter: float) -> list[tuple[float, float]]:
    if jitter <= 4:
        cells = rng.choice(GRID * GRID, size=len(radii), replace=False)
        shift = rng.uniform(-jitter / 64, jitter / 64, size=(len(radii), 2))
        return [
            ((c % GRID + 0.5) / GRID + dx, (c // GRID + 0.5) / GRID + dy)
            for c, (dx, dy) in zip(cells, shift, strict=True)
        ]
    centers: list[tuple[float, float]] = []
    while len(centers) < len(radii):
        radius = radii[len(centers)]
        x, y = rng.uniform(radius + 0.02, 0.98 - radius, size=2)
        gaps = (np.hypot(x - a, y - b) - 1.35 * (radius + r) for (a, b), r in zip(centers, radii, strict=False))
        if all(gap > 0.03 for gap in gaps):
            centers.append((float(x), float(y)))
    return centers


def cell_center(rng: np.random.Generator, x: int, y: int, jitter: float = 1.0) -> tuple[float, float]:
    """A place near the center of a cell, as in `draw_scene`."""
    dx, dy = rng.uniform(-jitter / 64, jitter / 64, size=2)
    return (x + 0.5) / GRID + float(dx), (y + 0.5) / GRID + float(dy)


def shape_mask(shape: str, radius: float, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """Whether points are inside a shape: boolean, broadcast of `dx` and `dy`.

    Args:
      shape: a name of `SHAPES`.
      radius: the object's radius.
      dx, dy: offsets of the points from the center, in the unit of `radius`.

    Raises:
      ValueError: unknown shape.
    """
    if shape == "circle":
        return dx**2 + dy**2 <= radius**2
    if shape == "square":
        return np.maximum(np.abs(dx), np.abs(dy)) <= 0.92 * radius
    if shape == "triangle":
        return (dy <= 0.92 * radius) & (dy >= -radius) & (np.abs(dx) <= 0.55 * (dy + radius))
    if shape == "cross":
        a, b = np.abs(dx), np.abs(dy)
        return (np.minimum(a, b) <= 0.34 * radius) & (np.maximum(a, b) <= radius)
    raise ValueError(f"unknown shape {shape!r}; known: {SHAPES}")


@functools.lru_cache(maxsize=8)
def _pixel_grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    axis = (np.arange(size) + 0.5) / size
    return np.meshgrid(axis, axis)


def render(scene: Scene, size: int = 64) -> np.ndarray:
    """Renders a scene with anti-aliasing: uint8 RGB [size, size, 3].

    The background is light gray with a slight tint, a linear gradient and noise, all seeded by `background_seed`.
    """
    rng = np.random.default_rng(scene.background_seed)
    x, y = _pixel_grid(size)
    base = rng.uniform(0.74, 0.92) + rng.uniform(-0.02, 0.02, size=3)
    slope = rng.uniform(-0.05, 0.05, size=2)
    image = base + ((x - 0.5) * slope[0] + (y - 0.5) * slope[1])[..., None]
    image = image + rng.normal(0, 0.012, size=(size, size, 1))
    sub = (np.arange(4) + 0.5) / 4
    for item in scene.objects:
        low = np.floor(np.array([item.y - item.radius, item.x - item.radius]) * size - 1).astype(int).clip(0)
        high = np.ceil(np.array([item.y + item.radius, item.x + item.radius]) * size + 1).astype(int).clip(max=size)
        rows, columns = (np.arange(a, b) for a, b in zip(low, high, strict=True))
        dy = ((rows[:, None] + sub).reshape(-1) / size - item.y)[:, None]
        dx = ((columns[:, None] + sub).reshape(-1) / size - item.x)[None, :]
        inside = shape_mask(item.shape, item.radius, dx, dy)
        cover = inside.reshape(len(rows), 4, len(columns), 4).mean((1, 3))[..., None]
        paint = np.array(COLOURS[item.colour]) / 255 + rng.normal(0, 0.008, size=3)
        window = image[low[0] : high[0], low[1] : high[1]]
        window[:] = window * (1 - cover) + paint * cover
    return (image.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def relations(a: SceneObject, b: SceneObject) -> tuple[str, ...]:
    """Relations of `a` to `b`, names of `RELATIONS`, by GenEval's rule (`offset_relations`)."""
    return offset_relations(b.x - a.x, b.y - a.y, 2 * (a.radius + b.radius), 2 * (a.radius + b.radius))


def offset_relations(dx: float, dy: float, widths: float, heights: float) -> tuple[str, ...]:
    """GenEval's rule: a relation holds if the offset along its axis, less a margin, is over half the offset's norm.

    The margin is 0.1 of the summed box sizes along that axis.

    Args:
      dx, dy: offset from a to b.
      widths, heights: sums of the widths and heights of the two bounding boxes.

    Returns:
      names of `RELATIONS` that hold for a relative to b; () if none does.
    """
    norm = float(np.hypot(dx, dy)) or 1.0
    sx = np.sign(dx) * max(abs(dx) - 0.1 * widths, 0) / norm
    sy = np.sign(dy) * max(abs(dy) - 0.1 * heights, 0) / norm
    flags = (sx > 0.5, sx < -0.5, sy > 0.5, sy < -0.5)
    return tuple(name for name, flag in zip(RELATIONS, flags, strict=True) if flag)


def relation_phrase(relation: str) -> str:
    """The preposition of a relation: "left of" for "left", "above" for "above"."""
    return f"{relation} of" if relation in ("left", "right") else relation


def noun(count: int, shape: str, colour: str | None) -> str:
    """A noun phrase: "a" (or "an") or the number, the colour if given, and the shape."""
    words = [colour] if colour else []
    if count > 1:
        return " ".join([NUMBERS[count], *words, PLURALS[shape]])
    first = (words + [shape])[0]
    return " ".join(["an" if first[0] in "aeiou" else "a", *words, shape])


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _reading_order(item: SceneObject) -> tuple[int, float]:
    return int(item.y * GRID), item.x


def _grouped(objects: tuple[SceneObject, ...], with_colour: bool) -> str:
    """Describes all objects in reading order (rows of cells, then columns); equal objects are counted together."""
    counts: dict[tuple[str, str | None], int] = {}
    for item in sorted(objects, key=_reading_order):
        look = (item.shape, item.colour if with_colour else None)
        counts[look] = counts.get(look, 0) + 1
    return _join([noun(n, s, c) for (s, c), n in counts.items()])


def captions(scene: Scene) -> list[str]:
    """All captions of a scene. Each names every object.

    The first caption has the most detail: colors, reading order and, for two objects, their relation if there is one.
    """
    found = [_grouped(scene.objects, True), _grouped(scene.objects, False)]
    if scene.kind == "two":
        a, b = sorted(scene.objects, key=_reading_order)
        for relation in relations(a, b)[:1]:
            phrases = (noun(1, a.shape, a.colour), relation_phrase(relation), noun(1, b.shape, b.colour))
            found.insert(0, " ".join(phrases))
        for first, second in ((a, b), (b, a)):
            found.append(_join([noun(1, first.shape, first.colour), noun(1, second.shape, second.colour)]))
            for relation in relations(first, second):
                phrase = relation_phrase(relation)
                found.append(f"{noun(1, first.shape, first.colour)} {phrase} {noun(1, second.shape, second.colour)}")
                if first.shape != second.shape:
                    found.append(f"{noun(1, first.shape, None)} {phrase} {noun(1, second.shape, None)}")
            if first.shape != second.shape:
                found.append(_join([noun(1, first.shape, None), noun(1, second.shape, None)]))
    return list(dict.fromkeys(found))


def questions(scene: Scene) -> list[tuple[str, str, str]]:
    """Questions with an unambiguous answer, as (question, answer, kind of `QUESTION_KINDS`).

    Always two existence questions (answers yes and no), then one question of each other kind that the scene allows; two
    for position, one in each direction.
    """
    rng = np.random.default_rng([scene.background_seed, 5])
    looks = [(o.shape, o.colour) for o in scene.objects]
    shapes, colours = [s for s, _ in looks], [c for _, c in looks]
    found = [_existence(rng, looks, True), _existence(rng, looks, False)]
    shape = shapes[rng.integers(len(shapes))]
    found.append((f"how many {PLURALS[shape]} are there?", NUMBERS[shapes.count(shape)], "count"))
    lone_shapes = [o for o in scene.objects if shapes.count(o.shape) == 1]
    if lone_shapes:
        item = lone_shapes[rng.integers(len(lone_shapes))]
        found.append((f"what colour is the {item.shape}?", item.colour, "colour"))
    lone_colours = [o for o in scene.objects if colours.count(o.colour) == 1]
    if lone_colours:
        item = lone_colours[rng.integers(len(lone_colours))]
        found.append((f"what shape is the {item.colour} object?", item.shape, "shape"))
    pairs = [(a, b) for a in lone_shapes for b in lone_shapes if a is not b and len(relations(a, b)) == 1]
    if pairs:
        pair = pairs[rng.integers(len(pairs))]
        for a, b in (pair, pair[::-1]):
            found.append((f"where is the {a.shape} from the {b.shape}?", relations(a, b)[0], "position"))
    return found


def _existence(rng: np.random.Generator, looks: list, positive: bool) -> tuple[str, str, str]:
    """A POPE-style existence question.

    About half of the questions name a color. Half of the colored negatives differ from an object of the scene in one
    word.
    """
    with_colour = rng.random() < 0.5
    shapes = {s for s, _ in looks}
    if positive:
        shape, colour = looks[rng.integers(len(looks))]
    elif with_colour or len(shapes) == len(SHAPES):
        with_colour = True
        while True:
            shape, colour = draw_look(rng)
            if rng.random() < 0.5:  # adversarial: change the shape or the color of an object of the scene
                near = looks[rng.integers(len(looks))]
                shape, colour = (near[0], colour) if rng.random() < 0.5 else (shape, near[1])
            if (shape, colour) not in looks:
                break
    else:
        missing = [s for s in SHAPES if s not in shapes]
        shape, colour = missing[rng.integers(len(missing))], ""
    text = noun(1, shape, colour if with_colour else None)
    return f"is there {text}?", "yes" if positive else "no", "existence"


def draw_prompt(task: str, seed: int, index: int) -> Prompt:
    """Text-to-image test item `index` of a task, a function of the arguments.

    Raises:
      ValueError: unknown task.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; the six tasks are {TASKS}")
    rng = np.random.default_rng([seed, TASKS.index(task), index, 72])
    first, second = (SHAPES[i] for i in rng.choice(4, size=2, replace=False))
    colour, other = (list(COLOURS)[i] for i in rng.choice(8, size=2, replace=False))
    if task == "single_object":
        return Prompt(task, noun(1, first, None), ((first, None),))
    if task == "two_objects":
        text = _join([noun(1, first, None), noun(1, second, None)])
        return Prompt(task, text, ((first, None), (second, None)))
    if task == "counting":
        count = int(rng.integers(2, 5))
        return Prompt(task, noun(count, first, None), ((first, None),) * count)
    if task == "colours":
        return Prompt(task, noun(1, first, colour), ((first, colour),))
    if task == "position":
        relation = RELATIONS[rng.integers(4)]
        text = f"{noun(1, first, None)} {relation_phrase(relation)} {noun(1, second, None)}"
        return Prompt(task, text, ((first, None), (second, None)), relation)
    text = _join([noun(1, first, colour), noun(1, second, other)])
    return Prompt(task, text, ((first, colour), (second, other)))
