"""Images per second of pretokenization against the tokenizer's forward pass alone, on the same images.

python -m benchmarks.pretokenize

Both sizes have random weights: the tokenizer of size laptop on 64-pixel images, and one with a ViT-B/14 encoder on
224-pixel images. Pretokenization reads JPEG files, decodes them, encodes them and writes records. The two are timed in
turn; the medians of three rounds are printed. Floor: 0.9 of the forward pass.
"""

import pathlib
import statistics
import tempfile
import time

import numpy as np
from PIL import Image

from unimm_jax import process, resolve
from unimm_jax.models.keys import Keys

SIZES = {
    "laptop": (dict(), dict(), 64, 2048, 256),
    "vit_b": (
        dict(image_size=224, patch_size=14, width=768, depth=12, heads=12, mlp_width=3072),
        dict(heads=12, mlp_width=3072, merger_depth=2),
        224,
        16,
        8,
    ),
}
ROUNDS = 3


def main() -> None:
    """Entry point."""
    process.prepare()
    import jax
    from flax import nnx

    from unimm_jax import text_tokenizer
    from unimm_jax.data.sources import DecodedDataset, open_source
    from unimm_jax.inference.loading import LoadedTokenizer
    from unimm_jax.inference.pretokenization import Encoder, write_split
    from unimm_jax.models.tokenizer import ImageTokenizer

    words = text_tokenizer.train(["a photo"], 300)
    for name, (encoder_shape, tokenizer_shape, side, count, batch) in SIZES.items():
        given = resolve.load("tokenizer:laptop")
        given.model.encoder.update(encoder_shape)
        given.model.image_tokenizer.update(tokenizer_shape)
        given.data.image_size = side
        config = resolve.parse(given)
        make = lambda c=config: ImageTokenizer(c.model["encoder"], c.model["image_tokenizer"], rngs=Keys(params=0))
        graph, state = nnx.split(make())
        encoder = Encoder(LoadedTokenizer(config, graph, nnx.to_pure_dict(state), "benchmark"), batch)
        with tempfile.TemporaryDirectory() as folder:
            root = pathlib.Path(folder)
            rng = np.random.default_rng(0)
            for i in range(count):
                small = Image.fromarray(rng.integers(0, 256, (12, 12, 3)).astype(np.uint8))
                small.resize((256, 256), Image.Resampling.BICUBIC).save(root / f"{i:05d}.jpg", quality=90)
                (root / f"{i:05d}.txt").write_text("a photo")
            images = DecodedDataset(open_source(f"folder:{root}", held_out=0.0), side)
            pixels = [np.stack([images[i].pixels[0] for i in range(at, at + batch)]) for at in range(0, count, batch)]
            jax.block_until_ready(encoder.start(pixels[0]))
            forward, whole = [], []
            for number in range(ROUNDS):
                began = time.perf_counter()
                for x in pixels:
                    jax.block_until_ready(encoder.start(x))
                forward.append(time.perf_counter() - began)
                fresh = DecodedDataset(open_source(f"folder:{root}", held_out=0.0), side)  # nothing is cached
                began = time.perf_counter()
                write_split(encoder, {0: fresh}, root / f"records{number}", words, "benchmark")
                whole.append(time.perf_counter() - began)
        alone, full = (count / statistics.median(times) for times in (forward, whole))
        print(f"{name}: pretokenize {full:.0f} images/s, forward pass {alone:.0f} images/s, ratio {full / alone:.2f}")


if __name__ == "__main__":
    main()
