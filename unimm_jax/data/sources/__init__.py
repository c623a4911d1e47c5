"""Registry of data sources by format; `open_source` opens one from its description.

To add a format, write a file with a class that implements `base.Source` and a classmethod `open(rest, split)`, and add
it to `REGISTRY`.
"""

import importlib
from typing import Any

from unimm_jax import storage
from unimm_jax.data.outlines import Message, Question, Record
from unimm_jax.data.sources.base import SPLITS, DecodedDataset, HeldOut, Source
from unimm_jax.errors import DataError

# prefix of a description → "module:class"; imported on first use
REGISTRY = {
    "scenes": "unimm_jax.data.sources.scenes:SceneSource",
    "scene_edits": "unimm_jax.data.sources.scene_edits:SceneEditSource",
    "scene_compositions": "unimm_jax.data.sources.scene_compositions:SceneCompositionSource",
    "scene_stories": "unimm_jax.data.sources.scene_stories:SceneStorySource",
    "folder": "unimm_jax.data.sources.folder:FolderSource",
    "tfds": "unimm_jax.data.sources.tfds:TfdsSource",
    "llava": "unimm_jax.data.sources.llava:LlavaSource",
    "chat": "unimm_jax.data.sources.chat:ChatSource",
    "text": "unimm_jax.data.sources.text:TextSource",
    "interleaved": "unimm_jax.data.sources.interleaved:InterleavedSource",
    "coco": "unimm_jax.data.sources.coco:CocoSource",
    "webdataset": "unimm_jax.data.sources.webdataset:WebdatasetSource",
    "parquet": "unimm_jax.data.sources.parquet:ParquetSource",
    "edit": "unimm_jax.data.sources.pairs:EditSource",
}


def open_source(description: str, split: str = "train", held_out: float = 0.02) -> Source:
    """Opens one source.

    Args:
      description: "scenes", "scenes:count=2000,seed=1", "FORMAT:PATH" with a format of `REGISTRY`, such as
        "llava:PATH,images=DIRECTORY", or the PATH of a directory, whose format is detected.
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


def split_sources(sources: str) -> list[str]:
    """The single sources of a setting `sources`. Their places are the numbers in `Records.source`."""
    return [source.strip() for source in sources.split(";") if source.strip()]


def source_number(source: str, listed: list[str]) -> int | None:
    """The number of a source, or of the only one that has the format `source`; None if there is none."""
    if source in listed:
        return listed.index(source)
    of_format = [number for number, name in enumerate(listed) if name.partition(":")[0] == source]
    return of_format[0] if len(of_format) == 1 else None


def get(name: str) -> Any:
    """The class of a format, a name of `REGISTRY`."""
    module, _, attribute = REGISTRY[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def detect(path: str) -> str:
    """Detects the format of a directory.

    Raises:
      DataError: the path does not exist or is a file.
    """
    directory = storage.path(path)
    kind = storage.kind(directory)
    if not kind:
        raise DataError(
            f"data source {path!r} is neither an existing directory nor one of {', '.join(REGISTRY)} (FORMAT:PATH)"
        )
    if kind == "file":
        raise DataError(
            f"data source {path!r} is a file; give its format, one of {', '.join(REGISTRY)} (FORMAT:PATH), or the "
            "directory that holds the images or the TFDS data set"
        )
    names = storage.children(directory)
    if "dataset_info.json" in names:
        return "tfds"
    if any(name.endswith(".tar") for name in names):
        return "webdataset"
    # beside a directory of the same name is what img2dataset notes about the images in that directory
    if any(name.endswith(".parquet") and not names.get(name.removesuffix(".parquet")) for name in names):
        return "parquet"
    return "edit" if "edits.jsonl" in names else "folder"


__all__ = [
    "REGISTRY",
    "DecodedDataset",
    "HeldOut",
    "Message",
    "Question",
    "Record",
    "Source",
    "detect",
    "get",
    "open_source",
    "source_number",
    "split_sources",
]
