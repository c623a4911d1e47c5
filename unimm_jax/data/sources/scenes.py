"""The embedded scenes (`unimm_jax.data.scenes`) as a data source."""

import dataclasses
from typing import ClassVar

from unimm_jax.data import scenes
from unimm_jax.data.outlines import Question, Record
from unimm_jax.data.sources.generated import GeneratedSource


@dataclasses.dataclass(eq=False)
class SceneSource(GeneratedSource):
    """Generated scenes by index.

    Attributes:
      split, count, seed: see `GeneratedSource`.
      jitter: placement difficulty; see `scenes.draw_scene`.
      size: side of the images in pixels. scale: of the objects' radius.
    """

    format: ClassVar[str] = "scenes"
    evaluator: ClassVar[str] = "scenes"

    count: int = 12000
    jitter: float = 1.0
    size: int = 64
    scale: float = 1.0

    def __getitem__(self, index: int) -> Record:
        scene = scenes.scaled(scenes.draw_scene(self.seed, self.split, index, self.jitter), self.scale)
        captions = scenes.captions(scene)
        # the first two questions are the two forms of the existence question
        questions = [Question(*question, alternative=i == 1) for i, question in enumerate(scenes.questions(scene))]
        image = scenes.render(scene, self.size)
        return Record(self.key(index), (image,), captions=captions[:1], prompts=captions[1:], questions=questions)

    def fingerprint(self) -> str:
        """See `Source.fingerprint`; the usual scale is left out, as before there was one."""
        whole = super().fingerprint()
        return whole.removesuffix(" 1.0") if self.scale == 1 else whole
