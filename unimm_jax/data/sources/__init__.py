"""Registry of data sources by format; `open_source` opens one from its description.

To add a format, write a file with a class that implements `base.Source` and a classmethod `open(rest, split)`, and add
it to `REGISTRY`.
"""

import importlib
import pathlib
from typing import Any

from unimm_jax.data.sources.base import SPLITS, HeldOut, ImageDataset, Record, Source
from unimm_jax.errors import DataError

# prefix of a description → "module:class"; imported on first use
REGISTRY = {
    "scenes": "unimm_jax.data.sources.scenes:SceneSource",
    "folder": "unimm_jax.data.sources.folder:FolderSource",
    "tfds": "unimm_jax.data.sources.tfds:TfdsSource",
}


def open_source(description: str, split: str = "train", held_out: float = 0.02) -> Source:
    """Opens one source.

    Args:
      description: "scenes", "scenes:count=2000,seed=1", "folder:PATH", "tfds:PATH", or a PATH, whose format is
        detected.
      split: "train" or "test".
      held_out: share of the records in the test split of a source without a test split; chosen by the hash of the key.

    Raises:
      DataError: unknown format, or the source is missing or unusable.
    """
    name, _, rest = description.partition(":")
    if name not in REGISTRY:
        name, rest = detect(description), description
    source: Source = get(name).open(rest, split)
    # a source without a test split of its own gives both splits by the hash of its keys, so that they share no record
    return source if set(SPLITS) <= set(source.splits) else HeldOut(source, split, held_out)


def get(name: str) -> Any:
    """The class of a format, a name of `REGISTRY`."""
    module, _, attribute = REGISTRY[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def detect(path: str) -> str:
    """Detects the format of a directory.

    Raises:
      DataError: the path does not exist or is a file.
    """
    directory = pathlib.Path(path).expanduser()
    if not directory.exists():
        raise DataError(
            f"data source {path!r} is neither an existing directory nor one of {', '.join(REGISTRY)} (FORMAT:PATH)"
        )
    if directory.is_file():
        raise DataError(
            f"data source {path!r} is a file; give the directory that holds the images or the TFDS data set"
        )
    return "tfds" if (directory / "dataset_info.json").exists() else "folder"


__all__ = ["REGISTRY", "HeldOut", "ImageDataset", "Record", "Source", "detect", "get", "open_source"]
