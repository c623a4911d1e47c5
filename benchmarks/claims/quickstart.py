"""The stages of the quickstart as commands, for experiments that vary a few of their settings."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.claims.stages import Command, pretokenizing, training

SIZE = "laptop"
STAGES = ("encoder", "selector", "tokenizer", "records", "pixel_decoder", "text", "stage1", "stage2", "stage3")


def commands(
    folder: pathlib.Path,
    seed: int,
    quick: bool,
    names: Sequence[str] = STAGES,
    settings: Mapping[str, Any] | None = None,
) -> list[Command]:
    """The commands of the named stages, each in its directory under `folder`, as `launch/quickstart.sh` runs them.

    Args:
      settings: stage → settings, or a function that gives them when the stage starts (`stages.training`).
    """
    changed = settings or {}
    return [
        pretokenizing(folder / name, SIZE, folder / "tokenizer")
        if name == "records"
        else training(name, SIZE, folder / name, seed, changed.get(name, {}), quick)
        for name in names
    ]
