"""Stories of scenes: a scene with its caption, then instructions and the scenes that they lead to, without roles.

A story is a chain of edits (`scene_edits.draw_chain`) as an interleaved document. Each image after the first follows
from the image and the text before it, and each text after the caption is an instruction that the image before it
allows. All scenes of a story are of its split.
"""

import dataclasses

from unimm_jax.data.scene_edits import SceneEdit, draw_chain
from unimm_jax.data.scenes import Scene, captions


@dataclasses.dataclass(frozen=True)
class Story:
    """A story.

    Attributes:
      caption: describes the first scene, with the most detail.
      edits: one or more, each of the result of the one before it.
    """

    caption: str
    edits: tuple[SceneEdit, ...]

    @property
    def scenes(self) -> tuple[Scene, ...]:
        """The scenes in order, one more than there are edits."""
        return (self.edits[0].source, *(edit.target for edit in self.edits))

    @property
    def content(self) -> tuple[str | int, ...]:
        """The parts of the document: the caption, image 0, the first instruction, image 1, and so on."""
        parts: list[str | int] = [self.caption, 0]
        for image, edit in enumerate(self.edits, 1):
            parts += [edit.instruction, image]
        return tuple(parts)


def draw_story(seed: int, split: str, index: int, turns: int) -> Story:
    """Samples story `index` of a split.

    Args:
      seed, split, index, turns: see `scene_edits.draw_chain`.

    Raises:
      ValueError: unknown split.
    """
    edits = draw_chain(seed, split, index, turns)
    return Story(captions(edits[0].source)[0], tuple(edits))
