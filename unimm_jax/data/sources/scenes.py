"""The embedded scenes (`unimm_jax.data.scenes`) as a data source. Nothing is downloaded or stored."""

from collections.abc import Mapping
from typing import Any

from unimm_jax.data import scenes
from unimm_jax.data.outlines import Question, Record
from unimm_jax.data.sources.base import SPLITS
from unimm_jax.errors import DataError

VERSION = 1  # increment when the same arguments give other scenes, images or texts
OPTIONS = {"count": int, "seed": int, "jitter": float, "size": int, "scale": float}


def parse_options(source: str, options: str, known: Mapping[str, type]) -> dict[str, Any]:
    """Options such as "count=2000,seed=1" of a generated source: name → number.

    Raises:
      DataError: unknown option, a value that is not a number, or one out of range.
    """
    found: dict[str, Any] = {}
    for item in filter(None, options.split(",")):
        name, _, value = item.partition("=")
        if name not in known:
            raise DataError(f"{source} has no option {name!r}; it has {', '.join(known)}")
        try:
            found[name] = known[name](value)
        except ValueError:
            raise DataError(f"{source} option {name}={value!r} is not a number") from None
        if name in ("count", "size", "turns") and found[name] < 1:
            raise DataError(f"{source} option {name}={value} must be at least 1")
        if name == "scale" and not 0 < found[name] <= 1:
            raise DataError(f"{source} option scale={value} must be above 0 and at most 1")
        if name == "seed" and found[name] < 0:
            raise DataError(f"{source} option seed={value} must not be negative")
    return found


class SceneSource:
    """Generated scenes by index.

    Args (constructor):
      split: "train" or "test".
      count: number of scenes.
      seed: data set seed.
      jitter: placement difficulty; see `scenes.draw_scene`.
      size: side of the images in pixels. scale: of the objects' radius.
    """

    splits = SPLITS
    evaluator = "scenes"

    def __init__(
        self,
        split: str = "train",
        count: int = 12000,
        seed: int = 0,
        jitter: float = 1.0,
        size: int = 64,
        scale: float = 1.0,
    ):
        self.name = f"scenes:{split}"
        self.split, self.count, self.seed, self.jitter, self.size = split, count, seed, jitter, size
        self.scale = scale

    @classmethod
    def open(cls, options: str, split: str) -> "SceneSource":
        """Opens a source from options such as "count=2000,seed=1"; all are optional.

        Raises:
          DataError: an unknown option, or a wrong value.
        """
        return cls(split, **parse_options("scenes", options, OPTIONS))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Record:
        scene = scenes.scaled(scenes.draw_scene(self.seed, self.split, index, self.jitter), self.scale)
        captions = scenes.captions(scene)
        # the first two questions are the two forms of the existence question
        questions = [Question(*question, alternative=i == 1) for i, question in enumerate(scenes.questions(scene))]
        image = scenes.render(scene, self.size)
        return Record(self.key(index), (image,), captions=captions[:1], prompts=captions[1:], questions=questions)

    def key(self, index: int) -> str:
        """See `Source.key`."""
        return f"{self.name}/{index}"

    def fingerprint(self) -> str:
        """See `Source.fingerprint`."""
        scale = "" if self.scale == 1 else f" {self.scale}"
        return f"scenes v{VERSION} {self.split} {self.count} {self.seed} {self.jitter} {self.size}{scale}"
