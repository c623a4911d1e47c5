"""Draws which patches of photographs the selector keeps. What it learns is in docs/experiments.md.

python -m benchmarks.photographs --output=runs/photographs

The photographs are those of scikit-image that are in the public domain or CC0. An encoder and a selector are trained
from scratch on random crops of them, with the stages and the settings of size laptop for own images, and 8 × 8 patches
per image. The drawn images are the whole photographs (center squares); crops of them were in the training data.
"""

import argparse
import pathlib
import subprocess
import sys

import numpy as np
from PIL import Image

from benchmarks.claims import experiment

SUBJECTS = {
    "astronaut": "an astronaut in an orange suit",
    "camera": "a man with a camera",
    "chelsea": "the face of a cat",
    "coffee": "a cup of coffee on a table",
    "hubble_deep_field": "galaxies in deep space",
    "rocket": "a rocket on its launch pad",
}
CROPS, SIDE, PATCH, SHOWN_SIDE = 200, 128, 16, 176


def photograph(name: str) -> Image.Image:
    """A photograph of scikit-image, in color."""
    import skimage.data

    return Image.fromarray(getattr(skimage.data, name)()).convert("RGB")


def center_square(image: Image.Image) -> Image.Image:
    """The largest centered square."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def write_crops(folder: pathlib.Path) -> None:
    """Writes random crops of every photograph with their captions: an image folder (docs/data.md)."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name, caption in SUBJECTS.items():
        image = photograph(name)
        for i in range(CROPS):
            side = int(min(image.size) * rng.uniform(0.4, 1.0))
            left, top = rng.integers(0, image.width - side + 1), rng.integers(0, image.height - side + 1)
            crop = image.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            crop.save(folder / f"{name}_{i:03d}.png")
            (folder / f"{name}_{i:03d}.txt").write_text(caption)


def train(stage: str, output: pathlib.Path, *settings: str) -> None:
    """Trains a stage as a user would."""
    shape = [f"--config.data.image_size={SIDE}", f"--config.model.encoder.image_size={SIDE}"]
    shape += [f"--config.model.encoder.patch_size={PATCH}", "--config.train.batch_size=32"]
    command = [sys.executable, "-m", "unimm_jax.main", f"--config={stage}:laptop", f"--workdir={output / stage}"]
    subprocess.run([*command, f"--config.data.sources={output / 'crops'}", *shape, *settings], check=True)


def kept(workdir: pathlib.Path, images: np.ndarray) -> np.ndarray:
    """Keep masks, boolean [N, P], of images uint8 [N, H, W, 3]."""
    import jax

    from unimm_jax import objectives
    from unimm_jax.checkpoint import read_meta, read_params
    from unimm_jax.inference.loading import stage_config

    config = stage_config(read_meta(workdir), workdir)
    objective_class = objectives.get(config.objective)
    objective = objective_class(config, objective_class.abstract_input(config))
    model = objective.module(jax.tree.map(jax.numpy.asarray, read_params(workdir)))
    return np.asarray(model.decide(model.encoder(model.encoder.normalize(images, jax.numpy.float32)))) > 0


def main() -> None:
    """Entry point."""
    from unimm_jax import process
    from unimm_jax.plotting import kept_patches, labelled

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=experiment.local_path, default=pathlib.Path("runs/photographs"))
    output = parser.parse_args().output.resolve()
    process.prepare()
    write_crops(output / "crops")
    train("encoder", output)
    train("selector", output, "--config.loss.keep_rate=(1.0,0.7,0.7,0.5)")
    squares = [center_square(photograph(name)) for name in SUBJECTS]
    keep = kept(output / "selector", np.stack([np.asarray(s.resize((SIDE, SIDE))) for s in squares]))
    large = [np.asarray(square.resize((SHOWN_SIDE, SHOWN_SIDE), Image.Resampling.LANCZOS)) for square in squares]
    drawn = [kept_patches(image, mask) for image, mask in zip(large, keep, strict=True)]
    labels = [""] * len(large) + [f"keeps {mask.sum()} of {mask.size} patches" for mask in keep]
    Image.fromarray(labelled(large + drawn, labels, len(large))).save(output / "photographs.png")
    print(f"wrote {output / 'photographs.png'}")


if __name__ == "__main__":
    main()
