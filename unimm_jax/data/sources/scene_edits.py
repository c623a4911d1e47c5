"""Edits of the embedded scenes (`unimm_jax.data.scene_edits`) as a data source. Nothing is downloaded or stored."""

from unimm_jax.data import scene_edits, scenes
from unimm_jax.data.outlines import Message, Record
from unimm_jax.data.sources.base import SPLITS
from unimm_jax.data.sources.scenes import parse_options

VERSION = 1  # increment when the same arguments give other scenes, images or texts
OPTIONS = {"count": int, "seed": int, "size": int, "turns": int}


class SceneEditSource:
    """Generated edits by index: one edit, or a conversation of several, each of the result of the one before it.

    Args (constructor):
      split: "train" or "test".
      count: number of records.
      seed: data set seed.
      size: side of the images in pixels.
      turns: largest number of edits per record; the numbers from 1 on take turns.
    """

    splits = SPLITS
    evaluator = "edits"

    def __init__(self, split: str = "train", count: int = 6000, seed: int = 0, size: int = 64, turns: int = 2):
        self.name = f"scene_edits:{split}"
        self.split, self.count, self.seed, self.size, self.turns = split, count, seed, size, turns

    @classmethod
    def open(cls, options: str, split: str) -> "SceneEditSource":
        """Opens a source from options such as "count=2000,turns=3"; all are optional.

        Raises:
          DataError: an unknown option, or a wrong value.
        """
        return cls(split, **parse_options("scene_edits", options, OPTIONS))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Record:
        edits = scene_edits.draw_chain(self.seed, self.split, index, 1 + index % self.turns)
        images = tuple(scenes.render(scene, self.size) for scene in (edits[0].source, *(edit.target for edit in edits)))
        if len(edits) == 1:
            return Record(self.key(index), images, instruction=edits[0].instruction)
        messages = [Message("user", (0, edits[0].instruction)), Message("assistant", (1,))]
        for image, edit in enumerate(edits[1:], 2):
            messages += [Message("user", (edit.instruction,)), Message("assistant", (image,))]
        return Record(self.key(index), images, messages=messages)

    def key(self, index: int) -> str:
        """See `Source.key`."""
        return f"{self.name}/{index}"

    def fingerprint(self) -> str:
        """See `Source.fingerprint`."""
        return f"scene_edits v{VERSION} {self.split} {self.count} {self.seed} {self.size} {self.turns}"
