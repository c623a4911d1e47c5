"""Compositions of the embedded scenes (`unimm_jax.data.scene_compositions`) as a data source. Nothing is stored."""

from unimm_jax.data import scene_compositions, scenes
from unimm_jax.data.outlines import Message, Record
from unimm_jax.data.sources.base import SPLITS
from unimm_jax.data.sources.scenes import parse_options

VERSION = 1  # increment when the same arguments give other scenes, images or texts
OPTIONS = {"count": int, "seed": int, "size": int}


class SceneCompositionSource:
    """Generated compositions by index, as conversations of one turn.

    Args (constructor):
      split: "train" or "test".
      count: number of records.
      seed: data set seed.
      size: side of the images in pixels.
    """

    splits = SPLITS
    evaluator = "compositions"

    def __init__(self, split: str = "train", count: int = 6000, seed: int = 0, size: int = 64):
        self.name = f"scene_compositions:{split}"
        self.split, self.count, self.seed, self.size = split, count, seed, size

    @classmethod
    def open(cls, options: str, split: str) -> "SceneCompositionSource":
        """Opens a source from options such as "count=2000"; all are optional.

        Raises:
          DataError: an unknown option, or a wrong value.
        """
        return cls(split, **parse_options("scene_compositions", options, OPTIONS))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Record:
        found = scene_compositions.draw_composition(self.seed, self.split, index)
        images = tuple(scenes.render(scene, self.size) for scene in (*found.images, found.target))
        messages = (Message("user", found.parts), Message("assistant", (len(found.images),)))
        return Record(self.key(index), images, messages=messages)

    def key(self, index: int) -> str:
        """See `Source.key`."""
        return f"{self.name}/{index}"

    def fingerprint(self) -> str:
        """See `Source.fingerprint`."""
        return f"scene_compositions v{VERSION} {self.split} {self.count} {self.seed} {self.size}"
