"""Edits of the embedded scenes (`unimm_jax.data.scene_edits`) as a data source."""

import dataclasses
from typing import ClassVar

from unimm_jax.data import scene_edits, scenes
from unimm_jax.data.outlines import Message, Record
from unimm_jax.data.sources.generated import GeneratedSource


@dataclasses.dataclass(eq=False)
class SceneEditSource(GeneratedSource):
    """Generated edits by index: one edit, or a conversation of several, each of the result of the one before it.

    Attributes:
      split, count, seed: see `GeneratedSource`.
      size: side of the images in pixels.
      turns: largest number of edits per record; the numbers from 1 on take turns.
    """

    format: ClassVar[str] = "scene_edits"
    evaluator: ClassVar[str] = "edits"
    version: ClassVar[int] = 2  # 1 had chains whose last edit undid the one before it

    size: int = 64
    turns: int = 2

    def __getitem__(self, index: int) -> Record:
        edits = scene_edits.draw_chain(self.seed, self.split, index, 1 + index % self.turns)
        images = tuple(scenes.render(scene, self.size) for scene in (edits[0].source, *(edit.target for edit in edits)))
        if len(edits) == 1:
            return Record(self.key(index), images, instruction=edits[0].instruction)
        messages = [Message("user", (0, edits[0].instruction)), Message("assistant", (1,))]
        for image, edit in enumerate(edits[1:], 2):
            messages += [Message("user", (edit.instruction,)), Message("assistant", (image,))]
        return Record(self.key(index), images, messages=messages)
