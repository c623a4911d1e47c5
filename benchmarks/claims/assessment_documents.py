"""Variants of the documents that `self_enhance build` writes: shuffled verdicts, or no corrections.

python -m benchmarks.claims.assessment_documents --kind=shuffled --documents=runs/enhancement --drawings=runs/drawings \
  --records=runs/records --output=runs/shuffled

The result is a source of chat messages like the original, and a function of the arguments.
"""

import argparse
import json
import pathlib
import shutil
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Row = dict[str, Any]
KINDS = ("shuffled", "no_correction")
ASSESSMENT = 2  # messages of a row before its correction: the question and the verdict


def verdict_of(row: Row) -> str:
    """The verdict text of a row."""
    return str(row["messages"][1]["content"][0]["text"])


def count(rows: Sequence[Row]) -> dict[str, int]:
    """The number of documents, of good verdicts, and of corrections."""
    from unimm_jax.enhancement.verdicts import from_text

    good = sum((verdict := from_text(verdict_of(row))) is not None and verdict.good for row in rows)
    return dict(documents=len(rows), good=good, corrections=sum(len(row["messages"]) > ASSESSMENT for row in rows))


def no_correction(rows: Sequence[Row]) -> list[Row]:
    """The rows without the turns after the verdict."""
    return [row | {"messages": row["messages"][:ASSESSMENT]} for row in rows]


def shuffled(rows: Sequence[Row], seed: int, real_image: Callable[[Row], str]) -> list[Row]:
    """The rows with the verdicts of other rows, at random.

    Every verdict is used once, and no row keeps its own (its new one can have the same text). A row with a bad verdict
    has a correction, to the real image of its own caption; a row with a good one has none. So there are as many
    corrections as before.

    Args:
      real_image: row → path of the real image of its caption, called for rows that had no correction and get one.

    Raises:
      ValueError: a verdict is not readable.
    """
    from unimm_jax.enhancement.verdicts import CORRECTION, from_text

    order = np.random.default_rng(seed).permutation(len(rows))
    source = np.empty_like(order)
    source[order] = np.roll(order, 1)
    found = []
    for row, other in zip(rows, source.tolist(), strict=True):
        text = verdict_of(rows[other])
        verdict = from_text(text)
        if verdict is None:
            raise ValueError(f"drawing {rows[other]['drawing']} has an unreadable verdict: {text!r}")
        messages = [row["messages"][0], {"role": "assistant", "content": [{"type": "text", "text": text}]}]
        if not verdict.good and len(row["messages"]) > ASSESSMENT:
            messages += row["messages"][ASSESSMENT:]
        elif not verdict.good:
            image = {"type": "image", "image": real_image(row)}
            messages.append({"role": "user", "content": [{"type": "text", "text": CORRECTION}]})
            messages.append({"role": "assistant", "content": [image]})
        found.append(row | {"messages": messages})
    return found


def read(folder: pathlib.Path) -> list[Row]:
    """The rows of the documents in a directory."""
    from unimm_jax.enhancement.building import DOCUMENTS

    return [json.loads(line) for line in (folder / DOCUMENTS).read_text(encoding="utf-8").splitlines()]


def image_writer(drawings: pathlib.Path, records: pathlib.Path, folder: pathlib.Path) -> Callable[[Row], str]:
    """A function that writes the real image of a row's caption to `folder` and returns its path there."""
    from unimm_jax.data.records import Records
    from unimm_jax.enhancement.drawings import Drawings

    found, stored = Drawings(drawings), Records.open(records)
    record_of = {drawing.index: drawing.record for block in found.complete() for drawing in found.block(block)}

    def write(row: Row) -> str:
        record = record_of[row["drawing"]]
        item, name = stored[record], f"images/real_{record:08d}.png"
        if item.key != row["key"]:
            raise SystemExit(f"drawing {row['drawing']} is not of record {record} in {records}")
        (folder / name).write_bytes(item.images[0])
        return name

    return write


def transform(
    kind: str, documents: pathlib.Path, drawings: pathlib.Path, records: pathlib.Path, output: pathlib.Path, seed: int
) -> None:
    """Writes the documents of a kind, and their images, to `output`; replaces what an interrupted run left there."""
    from benchmarks.claims import stages
    from unimm_jax.enhancement.building import DOCUMENTS

    began, rows = time.perf_counter(), read(documents)
    shutil.rmtree(output, ignore_errors=True)
    shutil.copytree(documents / "images", output / "images")
    if kind == "shuffled":
        rows = shuffled(rows, seed, image_writer(drawings, records, output))
    else:
        rows = no_correction(rows)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (output / DOCUMENTS).write_text("".join(lines), encoding="utf-8")
    print(f"{kind}: {count(rows)}")
    stages.write_done(output, time.perf_counter() - began)


def main() -> None:
    """Entry point."""
    from unimm_jax import process

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=KINDS, required=True)
    for name in ("documents", "drawings", "records", "output"):
        parser.add_argument(f"--{name}", type=pathlib.Path, required=True)
    parser.add_argument("--seed", type=int, default=0, help="of the shuffling")
    f = parser.parse_args()
    process.prepare()
    process.run(lambda: transform(f.kind, f.documents, f.drawings, f.records, f.output, f.seed))


if __name__ == "__main__":
    main()
