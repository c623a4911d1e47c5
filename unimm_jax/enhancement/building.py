"""Documents for stage 3 from drawings and their verdicts: conversations that the source `chat` reads."""

import hashlib
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unimm_jax import storage
from unimm_jax.data.records import Records
from unimm_jax.enhancement.assessing import counts_of, verdicts_on
from unimm_jax.enhancement.drawings import Drawing, Drawings, contents_of
from unimm_jax.enhancement.files import HEADER, claim, digest_of, hashed
from unimm_jax.enhancement.verdicts import CORRECTION, MAX_TOKENS, Verdict, question
from unimm_jax.errors import DataError

DOCUMENTS = "documents.jsonl"
_SUFFIXES = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpg", b"RIFF": "webp", b"GIF8": "gif", b"BM": "bmp"}


def build(drawings: str, records: str, output: str, verdicts: str = "", max_bad_share: float = 1.0) -> dict[str, Any]:
    """Writes `documents.jsonl` and its images, and returns the counts that it prints.

    A good image gives a turn with the image and a question, and the verdict as answer. A bad image gives the same, then
    a turn that asks for a correction, and the real image of the caption as answer. Verdicts whose text has more than
    `MAX_TOKENS` tokens are left out: a model writes no more. `pretokenize` reads the result as
    `chat:OUTPUT/documents.jsonl`. The result is a function of the arguments. Does nothing if it is there.

    Args:
      drawings: directory that `draw` wrote. records: those that it drew from. output: a new directory.
      verdicts: directory of the verdicts; that in the drawings' directory if empty.
      max_bad_share: largest share of bad images, from 0 to 1; surplus ones are left out, by a hash of their index.

    Raises:
      DataError: something is missing or does not belong together, nothing was assessed, or `output` is not new.
    """
    found = Drawings(storage.path(drawings))
    given = verdicts_on(found, verdicts)
    stored = Records.open(storage.path(records))
    if contents_of(stored) != found.header["records"]:
        raise DataError(f"the drawings in {drawings} are not of the records in {records}")
    identity = dict(
        drawings=found.identity,
        verdicts=digest_of([(index, given[index].to_json()) for index in sorted(given)]),
        max_bad_share=max_bad_share,
    )
    folder = storage.path(output)
    if storage.kind(folder / HEADER):
        claim(folder, identity, "documents")  # refuses those of other verdicts
        summary = json.loads(storage.read(folder / "summary.json"))
    else:
        is_remote = storage.is_remote(folder)
        present = set(storage.files_under(folder) if is_remote else storage.children(folder))
        if present and not is_remote:
            raise DataError(f"{output} is not empty; remove it or give another --output")
        with storage.output_folder(folder, last=HEADER) as partial:
            summary = write(found, stored, partial, given, max_bad_share)
            claim(partial, identity, "documents")
            # on an object store, what an interrupted run has copied is written again
            if present - set(storage.files_under(partial)):
                raise DataError(f"{output} is not empty; remove it or give another --output")
    wrong = ", ".join(f"{name} {number}" for name, number in summary["wrong"].items())
    print(
        f"documents: {summary['assessed']} in {folder / DOCUMENTS}, {summary['good']} good, {summary['bad']} bad "
        f"(wrong: {wrong}); left out: {summary['duplicates']} duplicates, {summary['surplus']} surplus bad images, "
        f"{summary['without_verdict']} drawings without a verdict, {summary.get('too_long', 0)} with a verdict of more "
        f"than {MAX_TOKENS} tokens"
    )
    return summary


def write(
    drawings: Drawings, stored: Records, folder: pathlib.Path, verdicts: Mapping[int, Verdict], max_bad_share: float
) -> dict[str, Any]:
    """Writes the documents, their images and `summary.json`; see `build`."""
    (folder / "images").mkdir(parents=True)
    seen: set[bytes] = set()
    kept: list[Drawing] = []
    duplicates, too_long = 0, 0
    for block in drawings.complete():
        for drawing in drawings.block(block):
            if drawing.index not in verdicts:
                continue
            if len(stored.text_tokenizer.encode(verdicts[drawing.index].to_text())) > MAX_TOKENS:
                too_long += 1
                continue
            look = hashlib.sha256(drawing.prompt.encode() + b"\0" + drawings.encoded(drawing)).digest()
            duplicates += look in seen
            if look not in seen:
                kept.append(drawing)
                seen.add(look)
    if not kept and too_long:
        raise DataError(f"no document is left: all {too_long} verdicts have more than {MAX_TOKENS} tokens")
    if not kept:
        raise DataError(f"none of the drawings in {drawings.path} has a verdict; assess them first")
    chosen = _without_surplus(kept, verdicts, max_bad_share)
    if not chosen:
        raise DataError(
            f"no document is left: all {len(kept)} images are bad, and --max_bad_share is {max_bad_share:g}; raise it, "
            "or draw more images"
        )
    with (folder / DOCUMENTS).open("w", encoding="utf-8") as stream:
        for drawing in chosen:
            image = f"images/{drawing.index:08d}.png"
            (folder / image).write_bytes(drawings.encoded(drawing))
            real = "" if verdicts[drawing.index].good else _real_image(stored, drawing, folder)
            row = document(drawing, verdicts[drawing.index], image, real)
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
    summary = counts_of({drawing.index: verdicts[drawing.index] for drawing in chosen})
    summary |= {"duplicates": duplicates, "surplus": len(kept) - len(chosen), "too_long": too_long}
    summary |= {"without_verdict": len(drawings) - len(verdicts)}
    storage.write_whole(folder / "summary.json", json.dumps(summary, indent=1).encode())
    return summary


def document(drawing: Drawing, verdict: Verdict, image: str, real: str = "") -> dict[str, Any]:
    """A row of the source `chat`; with a correction if the path of the real image is given."""
    asked = [{"type": "image", "image": image}, {"type": "text", "text": question(drawing.prompt)}]
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": [{"type": "text", "text": verdict.to_text()}]},
    ]
    if real:
        messages.append({"role": "user", "content": [{"type": "text", "text": CORRECTION}]})
        messages.append({"role": "assistant", "content": [{"type": "image", "image": real}]})
    return {"messages": messages, "drawing": drawing.index, "key": drawing.key}


def _without_surplus(
    drawings: Sequence[Drawing], verdicts: Mapping[int, Verdict], max_bad_share: float
) -> list[Drawing]:
    """The drawings, with at most a share of bad ones."""
    bad = [drawing.index for drawing in drawings if not verdicts[drawing.index].good]
    good = len(drawings) - len(bad)
    most = len(bad) if max_bad_share >= 1 else math.floor(good * max_bad_share / (1 - max_bad_share) + 1e-9)
    order = np.argsort(hashed(0, np.array(bad, np.int64)), kind="stable")[:most]
    kept = {bad[i] for i in order.tolist()}
    return [drawing for drawing in drawings if verdicts[drawing.index].good or drawing.index in kept]


def _real_image(stored: Records, drawing: Drawing, folder: pathlib.Path) -> str:
    """Writes the image that belongs to a caption, as the records hold it: its path in `folder`."""
    record = stored[drawing.record]
    if record.key != drawing.key or record.texts[drawing.text] != drawing.prompt:
        raise DataError(f"drawing {drawing.index} is not of record {drawing.record}; give the records that it is of")
    data = record.images[0]
    suffix = next((name for start, name in _SUFFIXES.items() if data.startswith(start)), "img")
    name = f"images/real_{drawing.record:08d}.{suffix}"
    if not (folder / name).exists():
        (folder / name).write_bytes(data)
    return name
