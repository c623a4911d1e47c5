"""Stories of the embedded scenes (`unimm_jax.data.scene_stories`) as a data source."""

import dataclasses
from typing import ClassVar

from unimm_jax.data import scene_stories, scenes
from unimm_jax.data.outlines import Record
from unimm_jax.data.sources.generated import GeneratedSource


@dataclasses.dataclass(eq=False)
class SceneStorySource(GeneratedSource):
    """Generated stories by index, as interleaved documents.

    Attributes:
      split, count, seed: see `GeneratedSource`.
      size: side of the images in pixels.
      turns: largest number of edits per story; the numbers from 1 on take turns.
    """

    format: ClassVar[str] = "scene_stories"
    evaluator: ClassVar[str] = "stories"
    version: ClassVar[int] = 2  # as `SceneEditSource`

    size: int = 64
    turns: int = 3

    def __getitem__(self, index: int) -> Record:
        story = scene_stories.draw_story(self.seed, self.split, index, 1 + index % self.turns)
        images = tuple(scenes.render(scene, self.size) for scene in story.scenes)
        return Record(self.key(index), images, content=story.content)
