"""Digests of batches, array by array and example by example, and the records that the examples come from."""

import dataclasses
import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from unimm_jax.data.documents import IGNORED
from unimm_jax.data.pipeline import Batch, Input, PackedRows
from unimm_jax.data.sources import DecodedDataset, HeldOut, split_sources

EXAMPLE_DIGITS = 8  # of the digest of an example; 16 of the digest of an array


@dataclasses.dataclass(frozen=True)
class RowDigests:
    """Digests of one row of a batch.

    Attributes:
      arrays: name → digest of the row's part of that array. examples: the digests of its examples, joined.
    """

    arrays: dict[str, str]
    examples: str


def of_rows(data: Input, batch: Batch) -> list[RowDigests]:
    """Digests of each row of a batch, or of the rows of it that this process holds."""
    size = len(next(iter(batch.values())))
    rows = [{name: array[i] for name, array in batch.items()} for i in range(size)]
    return [
        RowDigests(
            {name: _digest({name: array}, 16) for name, array in row.items()},
            "".join(_digest(example, EXAMPLE_DIGITS) for example in _examples(data, row)),
        )
        for row in rows
    ]


def of_batch(rows: Iterable[RowDigests]) -> dict[str, Any]:
    """Digests of a global batch from those of its rows, in order, so that processes can share the work.

    Rows of padding do not count, because their number depends on the devices.

    Returns:
      `arrays`: name → digest. `examples`: for each row the digests of its examples, joined; rows are separated by
      spaces.
    """
    rows = [row for row in rows if row.examples]
    arrays = {}
    for name in sorted(rows[0].arrays):
        joined = "".join(row.arrays[name] for row in rows)
        arrays[name] = hashlib.blake2b(joined.encode(), digest_size=8).hexdigest()
    return {"arrays": arrays, "examples": " ".join(row.examples for row in rows)}


def examples_of(text: str) -> list[list[str]]:
    """The digests of the examples of each row, from `examples` of `of_batch`."""
    return [[row[i : i + EXAMPLE_DIGITS] for i in range(0, len(row), EXAMPLE_DIGITS)] for row in text.split()]


def name_of(data: Input, row: int, example: int, rows: int) -> str:
    """How a message names an example of a batch, counted from 1.

    Args:
      row, example: its row in the batch and its place in the row, from 0. rows: number of rows of the batch.
    """
    if isinstance(data.rows, PackedRows):
        return f"example {example + 1} of row {row + 1} of {rows}"
    return f"image {row + 1} of {rows}"


def origin(data: Input, index: int, row: int, example: int) -> str:
    """The record that an example comes from: its number, its source and its key.

    Args:
      index: of the batch. row, example: as in `name_of`.
    """
    if isinstance(data.rows, PackedRows):
        found = data.rows.plan.rows(index)[row][example]
        return f"{_record(data, found.record)}, task {found.task}"
    place, number = data.rows.place(index * data.rows.batch_size + row)
    if data.records is not None:
        return _record(data, data.records.image_place(number)[0])
    dataset: DecodedDataset = data.rows.sources[place]
    number = dataset.usable(number)
    key, source = dataset.source.key(number), dataset.source
    if isinstance(source, HeldOut):
        number = int(source.index[number])
    return f"record {number} of {split_sources(data.header['sources'])[place]} (key {key})"


def _record(data: Input, number: int) -> str:
    records = data.records
    assert records is not None
    listed, source = split_sources(records.header.get("sources", "")), int(records.source[number])
    name = listed[source] if source < len(listed) else f"source {source}"
    return f"record {number} of {name} (key {records[number].key}, in {records.path})"


def _examples(data: Input, row: Batch) -> list[Batch]:
    """The parts of a row's arrays that belong to each of its examples."""
    if not isinstance(data.rows, PackedRows):
        return [row]
    found = []
    for segment in range(1, int(row["segments"].max()) + 1):
        inside = row["segments"] == segment
        features = row["feature_index"][inside]
        slots = np.unique(features[features != IGNORED] // data.rows.plan.packing.max_image_tokens)
        found.append({name: x[slots if name in ("images", "keep") else inside] for name, x in row.items()})
    return found


def _digest(arrays: Batch, digits: int) -> str:
    digest = hashlib.blake2b(digest_size=digits // 2)
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype} {array.shape} ".encode())
        digest.update(array.data if array.size else b"")
    return digest.hexdigest()
