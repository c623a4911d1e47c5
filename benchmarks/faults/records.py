"""Random records, which need no trained model."""

import pathlib

import numpy as np

from benchmarks.claims.stages import QUICK
from unimm_jax import text_tokenizer
from unimm_jax.data.outlines import flatten
from unimm_jax.data.records import RecordWriter
from unimm_jax.data.sources import open_source

WORDS, PATCHES = 400, 16


def write_records(folder: pathlib.Path, count: int, blocks: int = 1, words: int = WORDS) -> None:
    """Writes records of scenes with random keep masks and codes: nothing in them depends on a trained model.

    Args:
      words: size of the vocabulary of the text tokenizer.
    """
    sources = f"scenes:count={count}"
    source, rng = open_source(sources, "train"), np.random.default_rng(0)
    records = [source[i] for i in range(count)]
    tokenizer = text_tokenizer.train(sorted({text for record in records for text in flatten(record)[0]}), words)
    keep = rng.random((count, 1, PATCHES)) < 0.3
    keep[..., 0] = True
    codes = rng.integers(0, QUICK["model.image_tokenizer.codes"], keep.shape)
    writer = RecordWriter(folder, tokenizer, dict(fingerprint="random", sources=sources, places=count))
    items = [(0, *item) for item in zip(records, keep, codes, strict=True)]
    for block in range(blocks):
        writer.write(block, items[block * count // blocks : (block + 1) * count // blocks])
    shapes = dict(num_patches=PATCHES, codes=QUICK["model.image_tokenizer.codes"], image_size=64)
    writer.close(blocks, shapes | dict(positions="grid", selection="argmax"))
