"""Registry of judges, and what a judge is: it looks at a drawn image and its prompt, and gives a verdict.

To add a judge, write a file with a subclass of `Judge` and add its line to `REGISTRY`.
"""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any, Self

import numpy as np

from unimm_jax.enhancement.drawings import Drawing
from unimm_jax.enhancement.verdicts import Verdict
from unimm_jax.errors import DataError

# prefix of a description → "module:class"; imported on first use
REGISTRY = {
    "scenes": "unimm_jax.enhancement.judge_scenes:SceneJudge",
    "file": "unimm_jax.enhancement.judge_file:FileJudge",
    "endpoint": "unimm_jax.enhancement.judge_endpoint:EndpointJudge",
}
STOPPED = "stopped"  # kind of a `JudgeError` for an image that was not assessed because the run ends


class Judge:
    """Base class of judges.

    Attributes:
      workers: number of images that are assessed at the same time, by threads.
      patience: number of failures in a row after which a run stops; 0 is never.
      remedy: what gives verdicts on the images on which the judge failed, for messages.
      given: number of verdicts that the judge has, where it looks them up.
      spent: dollars of this process, over all runs.
      note_spent: called with `spent` after an attempt that was paid and gave no verdict; from any thread.
    """

    workers: int = 1
    patience: int = 0
    remedy: str = "run the command again to try them"
    given: int = 0
    spent: float = 0.0
    note_spent: Callable[[float], None] = staticmethod(lambda dollars: None)

    @classmethod
    def open(cls, rest: str) -> Self:
        """Opens a judge.

        Args:
          rest: the description without its prefix.

        Raises:
          DataError: an unknown option, a wrong value, or something that the judge needs is missing.
        """
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        """JSON-compatible description. Verdicts of judges with other ones do not go to the same directory."""
        raise NotImplementedError

    def start(self, header: Mapping[str, Any], spent: float, others: float, processes: int) -> None:
        """Called once before the first image.

        Args:
          header: of the drawings. spent: dollars by earlier runs of this process. others: by the other processes.
          processes: that run at the same time.

        Raises:
          DataError: the judge cannot assess these drawings.
        """
        del header, others, processes
        self.spent = spent

    def assess(self, drawing: Drawing, image: np.ndarray) -> Verdict:
        """Assesses one image; called by several threads.

        Args:
          image: uint8 [H, W, 3].

        Raises:
          JudgeError: no verdict on this image. The image is counted and can be assessed again.
          DataError: no image can be assessed. The run stops.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Ends the waits of running calls of `assess`. Called once, from another thread."""


def open_judge(description: str) -> Judge:
    """Opens a judge from a description such as "scenes", "file:PATH" or "endpoint:URL,model=NAME".

    Raises:
      DataError: an unknown judge, or see `Judge.open`.
    """
    name, _, rest = description.partition(":")
    if name not in REGISTRY:
        raise DataError(f"there is no judge {name[:80]!r}; judges are {', '.join(REGISTRY)}")
    module, _, attribute = REGISTRY[name].partition(":")
    kind: type[Judge] = getattr(importlib.import_module(module), attribute)
    return kind.open(rest)


def options_of(judge: str, text: str, kind: type) -> Any:
    """Options such as "model=NAME,workers=4" as a dataclass whose fields are str, int and float.

    Args:
      judge: its name, for messages. kind: the dataclass.

    Raises:
      DataError: an unknown or repeated option, or a value of another type.
    """
    known = {field.name: field.type for field in dataclasses.fields(kind)}
    found: dict[str, Any] = {}
    for item in filter(None, text.split(",")):
        name, _, value = item.partition("=")
        if name not in known:
            raise DataError(f"the judge {judge} has no option {name[:80]!r}; it has {', '.join(known)}")
        if name in found:
            raise DataError(f"the judge {judge} has the option {name} twice")
        convert: Any = known[name]
        try:
            found[name] = convert(value)
        except ValueError:
            raise DataError(f"the option {name}={value[:80]!r} of the judge {judge} is not a number") from None
    return kind(**found)
