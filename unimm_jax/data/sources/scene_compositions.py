"""Compositions of the embedded scenes (`unimm_jax.data.scene_compositions`) as a data source."""

import dataclasses
from typing import ClassVar

from unimm_jax.data import scene_compositions, scenes
from unimm_jax.data.outlines import Message, Record
from unimm_jax.data.sources.generated import GeneratedSource


@dataclasses.dataclass(eq=False)
class SceneCompositionSource(GeneratedSource):
    """Generated compositions by index, as conversations of one turn.

    Attributes:
      split, count, seed: see `GeneratedSource`.
      size: side of the images in pixels.
    """

    format: ClassVar[str] = "scene_compositions"
    evaluator: ClassVar[str] = "compositions"

    size: int = 64

    def __getitem__(self, index: int) -> Record:
        found = scene_compositions.draw_composition(self.seed, self.split, index)
        images = tuple(scenes.render(scene, self.size) for scene in (*found.images, found.target))
        messages = (Message("user", found.parts), Message("assistant", (len(found.images),)))
        return Record(self.key(index), images, messages=messages)
