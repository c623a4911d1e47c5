"""Compositions of scenes: a prompt with images, and the scene that has the objects of all its parts.

A prompt is an image and a text that names one more object, or two images. The objects of the first image keep their
places; those of the second keep theirs where they are free. All layouts of a composition are of its split.
"""

import dataclasses

import numpy as np

from unimm_jax.data.scenes import (
    GRID,
    RADII,
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

KINDS = ("image_text", "image_image")
MAX_OBJECTS = 2  # per image
WORDINGS = ("and {look}", "with {look}", "plus {look}")


@dataclasses.dataclass(frozen=True)
class Composition:
    """A composition.

    Attributes:
      kind: a name of `KINDS`.
      images: the scenes of the prompt. text: its text, after the image, or "".
      target: the scene with all objects; the places of those that the first image does not have are free.
    """

    kind: str
    images: tuple[Scene, ...]
    text: str
    target: Scene

    @property
    def parts(self) -> tuple[int | str, ...]:
        """The prompt: images, by their index, and the text, in order."""
        return (0, 1) if self.kind == "image_image" else (0, self.text)


def draw_composition(seed: int, split: str, index: int) -> Composition:
    """Samples composition `index` of a split; the kinds take turns.

    Args:
      seed, split, index: see `scenes.draw_scene`.

    Raises:
      ValueError: unknown split.
    """
    kind = KINDS[index % len(KINDS)]
    rng = np.random.default_rng([seed, index, 74])
    while True:
        found = _draw(rng, seed, split, kind)
        if layout_split(found.target.objects) == split:
            return found


def _draw(rng: np.random.Generator, seed: int, split: str, kind: str) -> Composition:
    images = [_small_scene(rng, seed, split) for _ in range(2 if kind == "image_image" else 1)]
    objects, text = list(images[0].objects), ""
    if kind == "image_image":
        more = images[1].objects
    else:
        shape, color = draw_look(rng)
        text = WORDINGS[rng.integers(len(WORDINGS))].format(look=noun(1, shape, color))
        x, y = cell_center(rng, *rng.integers(GRID, size=2).tolist())
        more = (SceneObject(shape, color, RADII[rng.integers(len(RADII))], x, y),)
    for item in more:
        free = free_cells(objects)
        if cell(item) not in free:
            x, y = cell_center(rng, *free[rng.integers(len(free))])
            item = dataclasses.replace(item, x=x, y=y)
        objects.append(item)
    return Composition(kind, tuple(images), text, dataclasses.replace(images[0], objects=tuple(objects)))


def _small_scene(rng: np.random.Generator, seed: int, split: str) -> Scene:
    while True:
        scene = draw_scene(seed, split, int(rng.integers(2**31)))
        if len(scene.objects) <= MAX_OBJECTS:
            return scene
