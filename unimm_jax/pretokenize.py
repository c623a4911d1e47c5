"""Writes records: what the frozen tokenizer says of every picture, so that language stages can pack exactly.

python -m unimm_jax.pretokenize --tokenizer=runs/tokenizer --output=runs/records [--sources=...]
"""

import hashlib
import json
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import app, flags
from flax import nnx
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from unimm_jax import distributed, sharding, text
from unimm_jax import main as process
from unimm_jax.checkpoint import find, read_meta, read_params
from unimm_jax.data import pipeline, transforms
from unimm_jax.data.packing import RecordWriter
from unimm_jax.models.tokenizer import VisualTokenizer
from unimm_jax.models.vit import normalize_pixels
from unimm_jax.objectives.base import models

BLOCK = 4096  # records that are lost at most when a run is interrupted


def open_tokenizer(workdir: str | pathlib.Path) -> tuple[ConfigDict, Any, Any, str]:
    """A tokenizer stage's (config, graph, parameters, fingerprint of weights and preprocessing)."""
    step = find(workdir)
    config = ConfigDict(json.loads(read_meta(step)["config"]))
    m = models(config)
    model = nnx.eval_shape(lambda: VisualTokenizer(m["encoder"], m["tokenizer"], rngs=nnx.Rngs(params=0)))
    params = read_params(step)
    digest = hashlib.sha256(transforms.PREPROCESSING.encode())
    for leaf in jax.tree.leaves(params):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return config, nnx.graphdef(model), params, digest.hexdigest()[:16]


def text_of(meta: dict[str, Any], where: str | pathlib.Path) -> text.TextTokenizer:
    """The text tokenizer that travels in a checkpoint's `meta`.

    Raises:
      ValueError: none does.
    """
    payload = json.loads(meta["tokenizer"])
    if payload is None:
        raise ValueError(f"{where} carries no text tokenizer; give a tokenizer.json or a sentencepiece .model file")
    return text.TextTokenizer(payload)


def pretokenize(tokenizer: str, output: str, sources: str, text_path: str, text_size: int, batch: int) -> None:
    """Tokenizes every usable record of the sources and writes them to `output`; does nothing if that is already done.

    Pictures are split over the devices of a process, blocks of `BLOCK` records over the processes. Run again after an
    interruption, it goes on with the blocks that are missing.

    Raises:
      ValueError: no tokenizer, no data, or records of another tokenizer in `output`.
    """
    started = time.perf_counter()
    config, graph, params, fingerprint = open_tokenizer(tokenizer)
    header_file = pathlib.Path(output) / "header.json"
    sources = sources or config.data.sources
    if header_file.exists():
        header = json.loads(header_file.read_text())
        if (header["fingerprint"], header["sources"]) != (fingerprint, sources):
            raise ValueError(
                f"{output} holds records of another tokenizer or of other data; remove it or give another --output"
            )
        print(f"records: {header['records']} are already in {output}")
        return
    config.data.sources = sources
    pictures = pipeline.open_pictures(config.data)
    if text_path and (pathlib.Path(text_path) / "checkpoints").exists():
        words = text_of(read_meta(text_path), text_path)
    elif text_path:
        words = text.load(text_path)
    else:
        words = text.train(sorted(set(pipeline.all_texts(pictures))), text_size)
    places = [(source, index) for source in pictures for index in range(len(source))]
    identity = dict(fingerprint=fingerprint, sources=sources, places=len(places), block=BLOCK)
    writer = RecordWriter(output, words, identity)

    devices = jax.local_devices()
    mesh = sharding.make_mesh((1, len(devices), 1), devices)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    batch = -(-batch // len(devices)) * len(devices)
    params, split = jax.device_put(params, whole), sharding.batch_sharding(mesh)
    encode = jax.jit(lambda params, images: nnx.merge(graph, params).encode(normalize_pixels(images)))
    blocks = range(-(-len(places) // BLOCK))
    mine = [b for b in blocks if b % jax.process_count() == jax.process_index() and not writer.has(b)]
    total, done, began = sum(len(places[b * BLOCK : (b + 1) * BLOCK]) for b in mine), 0, time.perf_counter()

    def tokenized(block: int) -> Iterator[tuple[dict, np.ndarray, np.ndarray]]:
        nonlocal done
        stop = min((block + 1) * BLOCK, len(places))
        for at in range(block * BLOCK, stop, batch):
            found = [source.load(index) for source, index in places[at : min(at + batch, stop)]]
            usable = [item for item in found if item is not None]
            if usable:
                images = np.stack([item["image"] for item in usable])
                images = np.pad(
                    images, ((0, batch - len(usable)), (0, 0), (0, 0), (0, 0))
                )  # one shape, one compilation
                keep, codes = map(np.asarray, encode(params, jax.device_put(images, split)))
                yield from zip(usable, keep, codes, strict=False)
            done += len(found)
            if at // batch % 10 == 9:
                speed = done / (time.perf_counter() - began)
                print(f"records  {done}/{total}  {speed:.0f}/s  ETA {(total - done) / speed:.0f} s", flush=True)

    for block in mine:
        writer.write(block, tokenized(block))
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("records")
    if jax.process_index():
        return
    m = models(config)
    header = writer.close(
        len(blocks),
        {
            "patches": m["encoder"].patches,
            "codes": m["tokenizer"].codes,
            "positions": m["tokenizer"].positions,
            "selection": m["tokenizer"].selection,
            "image_size": config.data.image_size,
        },
    )
    (pathlib.Path(output) / "done.json").write_text(json.dumps({"seconds": round(time.perf_counter() - started, 1)}))
    count = header["records"]
    print(
        f"records: {count} written to {output}, {header['tokens']:.2f} tokens a picture, {len(places) - count} skipped",
        flush=True,
    )


def main(_: list[str]) -> None:
    """Runs the command."""
    process.quiet()
    f = flags.FLAGS

    def command() -> None:
        distributed.start()
        pretokenize(f.tokenizer, f.output, f.sources, f.text_tokenizer, f.text_size, f.batch_size)

    process.run(command)


if __name__ == "__main__":
    process.prepare_process()
    flags.DEFINE_string("tokenizer", None, "Workdir of the tokenizer stage.", required=True)
    flags.DEFINE_string("output", None, "Directory that gets the records.", required=True)
    flags.DEFINE_string("sources", "", "Data sources; those that the tokenizer was trained on if empty.")
    flags.DEFINE_string(
        "text_tokenizer", "", "tokenizer.json, .model, a folder or checkpoint that holds one; else trained."
    )
    flags.DEFINE_integer("text_size", 512, "Ids of the text tokenizer that is trained.", lower_bound=300)
    flags.DEFINE_integer("batch_size", 256, "Pictures at a time.", lower_bound=1)
    app.run(main)
