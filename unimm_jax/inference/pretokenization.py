"""Pretokenization: keep masks and codes of every image by the frozen image tokenizer, written as records."""

import collections
import concurrent.futures
import dataclasses
import json
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from unimm_jax import distributed, sharding, storage, text_tokenizer
from unimm_jax.checkpoint import find, read_meta
from unimm_jax.config import Config
from unimm_jax.data import pipeline
from unimm_jax.data.outlines import Record
from unimm_jax.data.records import FORMAT, Records, RecordWriter
from unimm_jax.data.sources import DecodedDataset, split_sources
from unimm_jax.data.sources.base import Decoded
from unimm_jax.errors import CheckpointError, DataError, EmptySplitError
from unimm_jax.inference.loading import (
    LoadedTokenizer,
    load_image_tokenizer,
    stage_config,
    text_tokenizer_of,
    workdir_of,
)
from unimm_jax.interop.settings import components_read
from unimm_jax.objectives.tokenization import keep_rate_warning
from unimm_jax.progress import Progress
from unimm_jax.text_tokenizer import TextTokenizer

BLOCK = 4096  # records per block; an interrupted run loses at most one block per process
HELD_OUT_RECORDS = 512  # at most, per source


def pretokenize(
    image_tokenizer: str,
    output: str,
    sources: str,
    text_tokenizer_path: str,
    text_vocab_size: int,
    batch: int,
    reuse: str = "",
) -> None:
    """Tokenizes every usable record of the sources and writes them to `output`, held-out records to `output/test`.

    Images are split over the devices of a process, blocks of `BLOCK` records over the processes. An interrupted run
    resumes with the missing blocks. Does nothing if the records are complete.

    Args:
      image_tokenizer: workdir of the tokenizer stage. sources: data sources; those of the tokenizer if empty.
      text_tokenizer_path: file, directory or checkpoint; trains one with `text_vocab_size` ids if empty.
      batch: images at a time.
      reuse: directory of finished records. Its first blocks are copied while the sources are the same, and its text
        tokenizer is taken if no path is given. The records are those that are written without it and with this text
        tokenizer.

    Raises:
      CheckpointError: no tokenizer. DataError: no data, records of another tokenizer in `output`, or records in `reuse`
        that are of other tokenizers, of an earlier version, or begin with another source.
      StartupError: processes do not see the same `output`.
    """
    started = time.perf_counter()
    folder = storage.path(output)
    distributed.check_shared(folder, "output")
    tokenizer = load_image_tokenizer(image_tokenizer)
    data = tokenizer.config.data
    sources = sources or data.sources
    datasets = _open(sources, data, "train")
    if (folder / "header.json").exists():
        header = Records(folder).header
        now = dict(fingerprint=tokenizer.fingerprint, sources=sources, source_fingerprints=_fingerprints(datasets))
        if any(header.get(key, value) != value for key, value in now.items()):
            raise DataError(
                f"{output} holds records of another tokenizer or of other data; remove it or give another --output"
            )
        print(f"records: {header['records']} are already in {output}")
        return
    reused, common = Records(reuse) if reuse else None, 0
    if reused and not text_tokenizer_path:
        words = reused.text_tokenizer
    else:
        words = _text_tokenizer(text_tokenizer_path, text_vocab_size, datasets)
    if reused:
        _check_reuse(reused, tokenizer, words)
        common = _common_places(reused.header, sources, datasets)
        if not common:
            raise DataError(
                f"--reuse={reuse}: the records there begin with other data; name their sources first in --sources, in "
                "the same order"
            )
    target = target_keep_rate(tokenizer.config, image_tokenizer)  # in every process: Orbax reads collectively
    encoder = Encoder(tokenizer, batch)
    try:
        held_out = _open(sources, data, "test")
    except EmptySplitError as error:
        print(f"records: no held-out split ({error})", flush=True)
    else:
        write_split(encoder, held_out, folder / "test", words, sources, HELD_OUT_RECORDS)
    count, skipped, mean = write_split(encoder, datasets, folder, words, sources, reused=reused, common=common)
    if jax.process_index() == 0:
        seconds = round(time.perf_counter() - started, 1)
        storage.write_whole(folder / "done.json", json.dumps({"seconds": seconds}).encode())
        print(f"records: {count} written to {output}, {mean:.2f} tokens per image, {skipped} skipped", flush=True)
        rate = mean / tokenizer.config.model["encoder"].num_patches
        text = keep_rate_warning(rate, target) if target and rate else None
        if text is not None:
            print(f"records: warning: {text}", flush=True)


def target_keep_rate(config: Config, checkpoint: str | pathlib.Path) -> float:
    """The share of the patches that the selector of a tokenizer stage was trained to keep; 0 if it is not known.

    It is the last value of `config.loss.keep_rate` in the stage that the selector came from. A tokenizer whose selector
    came from no other stage (an imported LaVIT) has it itself.

    Args:
      config: of the tokenizer stage. checkpoint: its workdir or step directory.
    """
    if config.model["image_tokenizer"].selection not in ("argmax", "sample"):
        return 0.0
    readers = [entry for entry in config.init_from if components_read(entry, ["selector/x"])]
    if not readers:
        return config.loss.keep_rate[-1]
    workdir = workdir_of(find(storage.path(checkpoint)))
    source = storage.at(workdir, readers[-1]["checkpoint"])
    try:
        found = stage_config(read_meta(source), source)
    except CheckpointError:  # it was moved, or holds imported weights
        return 0.0
    return found.loss.keep_rate[-1] if found.objective == "tokenization" else 0.0


def _open(sources: str, data: Any, split: str) -> dict[int, DecodedDataset]:
    """The data sets by the number of their source; of split "test" those that are not empty.

    Raises:
      ConfigError: no source is named. DataError: a source is unusable. EmptySplitError: nothing is left.
    """
    found = {}
    for number, source in enumerate(split_sources(sources)):
        try:
            (found[number],) = pipeline.open_images(dataclasses.replace(data, sources=source), split, ())
        except EmptySplitError:
            if split == "train":
                raise
    if not found:
        raise EmptySplitError(f"no source of {sources!r} has records in its {split} split")
    return found


def _fingerprints(datasets: dict[int, DecodedDataset]) -> list[str]:
    return [dataset.source.fingerprint() for dataset in datasets.values()]


def _common_places(header: dict[str, Any], sources: str, datasets: dict[int, DecodedDataset]) -> int:
    """How many records the first sources hold that are the same in the header of finished records, usable or not."""
    same = 0
    for old, new in zip(split_sources(header["sources"]), split_sources(sources), strict=False):
        if old != new:
            break
        same += 1
    places = 0
    for known, (number, dataset) in zip(header["source_fingerprints"], datasets.items(), strict=False):
        if number >= same or dataset.source.fingerprint() != known:
            break
        places += len(dataset)
    return places


def _check_reuse(records: Records, tokenizer: LoadedTokenizer, words: TextTokenizer) -> None:
    """Raises DataError if finished records are of other tokenizers or of an earlier version."""
    here = f"--reuse={records.path}: the records there"
    if records.header["fingerprint"] != tokenizer.fingerprint:
        raise DataError(f"{here} are of another image tokenizer")
    if records.text_tokenizer.payload != words.payload:
        raise DataError(f"{here} are of another text tokenizer; leave out --text_tokenizer to use theirs")
    if records.header.get("records_format") != FORMAT or records.header.get("block") != BLOCK or not records.has_sizes:
        raise DataError(f"{here} are of an earlier version; leave out --reuse")


def _text_tokenizer(path: str, vocab_size: int, datasets: dict[int, DecodedDataset]) -> TextTokenizer:
    if path and (storage.path(path) / "checkpoints").exists():
        return text_tokenizer_of(read_meta(path), path)
    if path:
        return text_tokenizer.load(path)
    return text_tokenizer.train(sorted(set(pipeline.all_texts(list(datasets.values())))), vocab_size)


class Encoder:
    """The image tokenizer over all local devices: images uint8 [N, S, S, 3] → keep masks and codes.

    Args (constructor):
      batch: images at a time, rounded up to a multiple of the devices; one shape, one compilation.
    """

    def __init__(self, tokenizer: LoadedTokenizer, batch: int):
        devices = jax.local_devices()
        mesh = sharding.make_mesh((1, len(devices), 1), devices)
        self.tokenizer, self.batch = tokenizer, -(-batch // len(devices)) * len(devices)
        self._params = jax.device_put(tokenizer.params, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
        self._split = sharding.batch_sharding(mesh)
        self._encode = jax.jit(self._encode_images)

    def _encode_images(self, params: Any, images: jax.Array, noise: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        module = self.tokenizer.module(params)
        return module.encode(module.encoder.normalize(images), noise)

    def start(self, images: np.ndarray) -> tuple[jax.Array, jax.Array]:
        """At most `batch` images → (keep boolean, codes int32), both [batch, P]; does not wait for the devices."""
        padded = np.pad(images, ((0, self.batch - len(images)), (0, 0), (0, 0), (0, 0)))
        inputs = jax.device_put((padded, self.tokenizer.noise(padded)), self._split)
        return self._encode(self._params, *inputs)


def write_split(
    encoder: Encoder,
    datasets: dict[int, DecodedDataset],
    folder: pathlib.Path,
    words: TextTokenizer,
    sources: str,
    limit: int = 0,
    reused: Records | None = None,
    common: int = 0,
) -> tuple[int, int, float]:
    """Writes the records of one split: (records, unusable records, mean tokens per image).

    Args:
      datasets: by the number of their source. limit: maximum number of records per data set; 0 is all.
      reused: finished records of the same tokenizers, of which whole blocks are copied.
      common: number of their first records, usable or not, that are the same.
    """
    lengths = {source: min(len(d), limit) if limit else len(d) for source, d in datasets.items()}
    items = [(source, i) for source, length in lengths.items() for i in range(length)]
    identity = dict(fingerprint=encoder.tokenizer.fingerprint, sources=sources, places=len(items), block=BLOCK)
    writer = RecordWriter(folder, words, identity | {"source_fingerprints": _fingerprints(datasets)})
    blocks = range(-(-len(items) // BLOCK))
    if reused:
        whole = common // BLOCK
        if jax.process_index() == 0:
            print(f"records: {whole * BLOCK} of {len(items)} are copied from {reused.path}", flush=True)
        for block in range(jax.process_index(), whole, jax.process_count()):
            if not writer.has(block):
                writer.copy(block, reused.path)
    mine = [b for b in blocks if b % jax.process_count() == jax.process_index() and not writer.has(b)]
    progress = Progress(sum(len(items[b * BLOCK : (b + 1) * BLOCK]) for b in mine))
    for block in mine:
        writer.write(block, _encoded(encoder, datasets, items[block * BLOCK : (block + 1) * BLOCK], progress))
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"records {folder.name}")
    if jax.process_index():
        return 0, 0, 0.0
    config = encoder.tokenizer.config
    m = config.model["image_tokenizer"]
    shapes = dict(num_patches=config.model["encoder"].num_patches, codes=m.codes, image_size=config.data.image_size)
    header = writer.close(len(blocks), shapes | dict(positions=m.positions, selection=m.selection, fit=config.data.fit))
    return header["records"], len(items) - header["records"], header["tokens"]


def _loaded(
    datasets: dict[int, DecodedDataset], items: list[tuple[int, int]], batch: int
) -> Iterator[list[tuple[int, Decoded | None]]]:
    """The records of each batch of items with the number of their source; threads decode up to two batches ahead."""
    parts = [items[at : at + batch] for at in range(0, len(items), batch)]
    is_remote = any(dataset.is_remote for dataset in datasets.values())
    with concurrent.futures.ThreadPoolExecutor(pipeline.REMOTE_THREADS if is_remote else pipeline.THREADS) as pool:
        ahead: collections.deque = collections.deque()
        for number, part in enumerate(parts):
            for following in parts[number + len(ahead) : number + 3]:
                ahead.append([pool.submit(datasets[source].load, index) for source, index in following])
            loads = ahead.popleft()
            yield [(source, load.result()) for (source, _), load in zip(part, loads, strict=True)]


def _encoded(
    encoder: Encoder, datasets: dict[int, DecodedDataset], items: list[tuple[int, int]], progress: Progress
) -> Iterator[tuple[int, Record, np.ndarray, np.ndarray]]:
    """(number of the source, record, keep masks [N, P], codes [N, P]) of every usable record.

    A batch is written while the devices work on the next one.
    """
    num_patches = encoder.tokenizer.config.model["encoder"].num_patches
    running: tuple[list[tuple[int, Decoded]], list[Any]] = ([], [])

    def finish() -> Iterator[tuple[int, Record, np.ndarray, np.ndarray]]:
        usable, results = running
        keep = np.concatenate([np.zeros((0, num_patches), bool), *(np.asarray(keep) for keep, _ in results)])
        codes = np.concatenate([np.zeros((0, num_patches), np.int32), *(np.asarray(codes) for _, codes in results)])
        end = 0
        for source, item in usable:
            start, end = end, end + len(item.pixels)
            yield source, item.record, keep[start:end], codes[start:end]

    for loaded in _loaded(datasets, items, encoder.batch):
        usable = [(source, item) for source, item in loaded if item is not None]
        pixels = [image for _, item in usable for image in item.pixels]
        cuts = range(0, len(pixels), encoder.batch)
        results = [encoder.start(np.stack(pixels[at : at + encoder.batch])) for at in cuts]
        yield from finish()
        running = (usable, results)
        progress.add(len(loaded))
    yield from finish()
