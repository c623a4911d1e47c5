"""JPEG files to batches of images of 224 pixels, against PyTorch's DataLoader and tf.data (if installed).

python -m benchmarks.input_pipeline        # pip install simplejpeg; tensorflow-cpu for tf.data

256 generated images of 500 × 375 pixels, batches of 32, four passes per round. DataLoader has 0, 1 and 2 workers and
calls our decoding function. tf.data decodes and resizes (antialiased bicubic) in C++ on as many threads as it chooses.
Ours reads a few batches ahead, also during the turn of a peer; that is about an eighth of a round.
"""

import importlib.util
import io
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import timing
from unimm_jax import process, resolve
from unimm_jax.config import Config
from unimm_jax.data import pipeline, transforms
from unimm_jax.data.sources import base

IMAGES, BATCH, SIZE, PASSES = 256, 32, 224, 4


def write(folder: pathlib.Path) -> None:
    """Writes smooth random images, which are as much work for JPEG as photographs."""
    rng = np.random.default_rng(0)
    for index in range(IMAGES):
        small = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        small.resize((500, 375), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        (folder / f"{index:04d}.jpg").write_bytes(buffer.getvalue())
        (folder / f"{index:04d}.txt").write_text("an image")


def config_of(folder: pathlib.Path) -> Config:
    """A stage that reads all images of the folder."""
    c = resolve.load("tokenizer:7b")
    c.train.batch_size, c.data.sources, c.data.held_out = BATCH, str(folder), 0.0
    return resolve.parse(c)


class Peer(torch.utils.data.Dataset):
    """The same files, decoded by the same function."""

    def __init__(self, folder: pathlib.Path):
        self.files = sorted(folder.glob("*.jpg"))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> np.ndarray:
        return transforms.to_pixels(self.files[index].read_bytes(), SIZE)


def data_loader(folder: pathlib.Path, workers: int) -> Callable[[], None]:
    """A round of DataLoader."""
    more: dict[str, Any] = dict(persistent_workers=True, prefetch_factor=4) if workers else {}
    loader = torch.utils.data.DataLoader(Peer(folder), BATCH, shuffle=True, num_workers=workers, **more)

    def once() -> None:
        assert sum(len(x) for _ in range(PASSES) for x in loader) == PASSES * IMAGES

    return once


def tf_data(folder: pathlib.Path) -> Callable[[], None]:
    """A round of tf.data."""
    import tensorflow as tf

    def read(file):
        image = tf.io.decode_jpeg(tf.io.read_file(file), channels=3)
        image = tf.image.resize(image, (SIZE, SIZE), method="bicubic", antialias=True)
        return tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8)

    files = tf.data.Dataset.list_files(str(folder / "*.jpg"), shuffle=True).repeat(PASSES)
    batches = files.map(read, num_parallel_calls=tf.data.AUTOTUNE).batch(BATCH).prefetch(tf.data.AUTOTUNE)

    def once() -> None:
        assert sum(len(x) for x in batches.as_numpy_iterator()) == PASSES * IMAGES

    return once


def main(rounds: int = 5) -> None:
    """Prints the comparison."""
    process.prepare()
    base.CACHE_BYTES = 0  # every visit decodes
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        write(folder)
        config = config_of(folder)
        batches = iter(pipeline.image_input(config, pipeline.open_images(config.data)).iterate())

        def ours() -> None:
            for _ in range(PASSES * IMAGES // BATCH):
                assert next(batches)["images"].shape == (BATCH, SIZE, SIZE, 3)

        peers = {f"DataLoader, {n} workers": data_loader(folder, n) for n in (0, 1, 2)}
        if importlib.util.find_spec("tensorflow"):
            peers["tf.data"] = tf_data(folder)
        timing.compare(f"{PASSES * IMAGES} JPEG files, {BATCH} a batch", ours, peers, rounds)


if __name__ == "__main__":
    main()
