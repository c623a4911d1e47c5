"""From a folder of JPEG files to batches of 224 pixels, against PyTorch's DataLoader and (where installed) tf.data.

python -m benchmarks.input_pipeline        (pip install simplejpeg; tensorflow-cpu for the second peer)

256 made pictures of 500 × 375 pixels, batches of 32, four passes a round (ours reads four batches ahead, also while the
peer has its turn: an eighth of a round). DataLoader has 0, 1 and 2 workers and our decoding function; tf.data does the
same work, decoding and antialiased bicubic resizing, in its own C++ on as many threads as it likes.
"""

import importlib.util
import io
import pathlib
import tempfile

import numpy as np
import torch
from ml_collections import ConfigDict
from PIL import Image

from benchmarks import timing
from unimm_jax import main as process
from unimm_jax.data import pipeline, sources, transforms

PICTURES, BATCH, SIZE, PASSES = 256, 32, 224, 4


def write(folder: pathlib.Path) -> None:
    """Smooth random pictures, so that JPEG has photographs' work."""
    rng = np.random.default_rng(0)
    for index in range(PICTURES):
        small = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        small.resize((500, 375), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        (folder / f"{index:04d}.jpg").write_bytes(buffer.getvalue())
        (folder / f"{index:04d}.txt").write_text("a picture")


class Peer(torch.utils.data.Dataset):
    """The same files by the same function."""

    def __init__(self, folder: pathlib.Path):
        self.files = sorted(folder.glob("*.jpg"))

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        return transforms.to_pixels(self.files[index].read_bytes(), SIZE)


def tf_data(folder: pathlib.Path):
    """A round of tf.data."""
    import tensorflow as tf

    def read(file):
        image = tf.io.decode_jpeg(tf.io.read_file(file), channels=3)
        image = tf.image.resize(image, (SIZE, SIZE), method="bicubic", antialias=True)
        return tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8)

    files = tf.data.Dataset.list_files(str(folder / "*.jpg"), shuffle=True).repeat(PASSES)
    batches = files.map(read, num_parallel_calls=tf.data.AUTOTUNE).batch(BATCH).prefetch(tf.data.AUTOTUNE)

    def once():
        assert sum(len(x) for x in batches.as_numpy_iterator()) == PASSES * PICTURES

    return once


def main() -> None:
    """Prints the comparison."""
    process.prepare_process()
    sources.CACHE_BYTES = 0  # every visit decodes
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        write(folder)
        config = ConfigDict(dict(train=dict(steps=1, batch_size=BATCH), seed=0, model={}))
        config.data = dict(sources=str(folder), image_size=SIZE)
        data = pipeline.picture_input(config, None, pipeline.open_pictures(config.data))
        batches = iter(data.iterate(BATCH))

        def ours():
            for _ in range(PASSES * PICTURES // BATCH):
                assert next(batches)["images"].shape == (BATCH, SIZE, SIZE, 3)

        def peer(workers):
            more = dict(persistent_workers=True, prefetch_factor=4) if workers else {}
            loader = torch.utils.data.DataLoader(Peer(folder), BATCH, shuffle=True, num_workers=workers, **more)

            def once():
                assert sum(len(x) for _ in range(PASSES) for x in loader) == PASSES * PICTURES

            return once

        peers = {f"DataLoader, {n} workers": peer(n) for n in (0, 1, 2)}
        if importlib.util.find_spec("tensorflow"):
            peers["tf.data"] = tf_data(folder)
        timing.compare(f"{PASSES * PICTURES} JPEG files, {BATCH} a batch", ours, peers, rounds=5)


if __name__ == "__main__":
    main()
