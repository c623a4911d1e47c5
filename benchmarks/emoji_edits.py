"""Edits of real images: emoji in two styles, "draw it in the style of twitter".

python -m benchmarks.emoji_edits write EMOJI OUTPUT [--concepts=400] [--held_out=0.2] [--seed=0]
python -m benchmarks.emoji_edits score --checkpoint=RUN/stage3 --data=OUTPUT/test [--guidance=1] [--images=FILE.png]

EMOJI is a directory with `emoji.jsonl`, one row {"image", "name", "style", ...} per image, and the images. `write`
makes OUTPUT/train/ and OUTPUT/test/: images with .txt captions, and `edits.jsonl` with both directions of every pair.
The concepts of the two are disjoint.

`score` edits the images of a directory and compares squared errors of pixels. *Concept* is the share of the results
that are nearer to their target than to the targets of 15 other edits into the same style (by chance: 0.0625). *Style*
is the share that are nearer to their target than to their source. The same scores are given for the source itself, and
for the target decoded from its own codes, an upper bound. `--images` draws sources, results and targets of 32 edits.
"""

import argparse
import json
import pathlib
import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.claims import experiment
from benchmarks.emoji_questions import place

OTHERS = 15  # targets that a result is compared with, beside its own


def write(emoji: pathlib.Path, output: pathlib.Path, concepts: int, held_out: float, seed: int) -> dict[str, int]:
    """Writes images, captions and edits: number of edits by split."""
    pairs: dict[str, list[dict[str, Any]]] = {}
    for line in (emoji / "emoji.jsonl").read_text().splitlines():
        row = json.loads(line)
        pairs.setdefault(row["name"], []).append(row)
    names = sorted(name for name, rows in pairs.items() if len({row["style"] for row in rows}) == 2)
    names = random.Random(seed).sample(names, min(concepts, len(names)))
    test = round(len(names) * held_out)
    return {
        "train": _write_split(emoji, output / "train", [pairs[name] for name in names[test:]]),
        "test": _write_split(emoji, output / "test", [pairs[name] for name in names[:test]]),
    }


def _write_split(emoji: pathlib.Path, folder: pathlib.Path, pairs: Sequence[list[dict[str, Any]]]) -> int:
    edits = []
    for rows in pairs:
        for row in rows:
            place(emoji, folder, row)
        by_style = {row["style"]: row["image"] for row in rows}
        for source, target in (sorted(by_style), sorted(by_style, reverse=True)):
            instruction = f"draw it in the style of {target}"
            edits.append({"source": by_style[source], "target": by_style[target], "instruction": instruction})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "edits.jsonl").write_text("".join(json.dumps(edit) + "\n" for edit in edits))
    return len(edits)


def matches(made: np.ndarray, targets: np.ndarray, styles: Sequence[str], seed: int = 0) -> float:
    """The share of images that are nearer to their own target than to `OTHERS` of the same style.

    Args:
      made, targets: uint8 [N, S, S, 3]. styles: instruction of each; the others have the same one.
    """
    rng, right = np.random.default_rng(seed), []
    pixels, goals = (np.asarray(images, np.float32).reshape(len(images), -1) for images in (made, targets))
    for i, style in enumerate(styles):
        same = [j for j, other in enumerate(styles) if other == style and j != i]
        others = rng.choice(same, min(OTHERS, len(same)), replace=False)
        distances = ((goals[[i, *others]] - pixels[i]) ** 2).mean(1)
        right.append(distances.argmin() == 0)
    return float(np.mean(right))


def nearer(made: np.ndarray, targets: np.ndarray, sources: np.ndarray) -> float:
    """The share of images uint8 [N, S, S, 3] that are nearer to their target than to their source."""
    pixels, goal, start = (np.asarray(images, np.float32) for images in (made, targets, sources))
    return float(np.mean(((pixels - goal) ** 2).mean((1, 2, 3)) < ((pixels - start) ** 2).mean((1, 2, 3))))


def grid(columns: Sequence[np.ndarray], count: int = 32, width: int = 16) -> np.ndarray:
    """Images uint8 [N, S, S, 3] below each other, `count` of each evenly over the N, `width` beside each other."""
    chosen = np.linspace(0, len(columns[0]) - 1, min(count, len(columns[0]))).astype(int)
    rows = []
    for at in range(0, len(chosen), width):
        part = [np.concatenate(list(images[chosen[at : at + width]]), 1) for images in columns]
        rows += [np.pad(row, ((0, 0), (0, width * row.shape[0] - row.shape[1]), (0, 0))) for row in part]
    return np.concatenate(rows)


def score(checkpoint: str, data: str, guidance: float, drawing: str) -> dict[str, tuple[float, float]]:
    """Edits all images of a directory: (concept, style) of the results, the sources and the decoded targets.

    Args:
      guidance: away from the reconstruction of the source.
      drawing: PNG file for `grid` of sources, results and targets; none if empty.
    """
    import jax
    from PIL import Image

    from unimm_jax.data.sources import DecodedDataset, open_source
    from unimm_jax.inference.generator import Generator
    from unimm_jax.inference.loading import load_model
    from unimm_jax.inference.sampling import Sampling

    model = load_model(checkpoint)
    generator = Generator(model, 64)
    images = DecodedDataset(open_source(f"edit:{data}", held_out=0.0), model.config.data.image_size)
    records = [images[i] for i in range(len(images))]
    sources, targets = (np.stack([record.pixels[k] for record in records]) for k in (0, 1))
    asked = [record.record.instruction for record in records]
    with jax.set_mesh(model.mesh):
        made = generator.edit_images(
            list(sources), [[text] for text in asked], Sampling(guidance=guidance, temperature=0.7)
        )
        decoded = generator.decode(*generator.tokenize(targets), generator.decoder_name(""))
    if drawing:
        Image.fromarray(grid([sources, made[0], targets])).save(drawing)
    found = {"edited": made[0], "source": sources, "target from its codes": decoded}
    return {name: (matches(result, targets, asked), nearer(result, targets, sources)) for name, result in found.items()}


def main() -> None:
    """Writes the data or scores a model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    writing = commands.add_parser("write")
    writing.add_argument("emoji", type=pathlib.Path)
    writing.add_argument("output", type=experiment.local_path)
    writing.add_argument("--concepts", type=int, default=400)
    writing.add_argument("--held_out", type=float, default=0.2)
    writing.add_argument("--seed", type=int, default=0)
    scoring = commands.add_parser("score")
    scoring.add_argument("--checkpoint", required=True)
    scoring.add_argument("--data", required=True)
    scoring.add_argument("--guidance", type=float, default=1.0, help="away from the reconstruction of the source")
    scoring.add_argument("--images", default="")
    given = parser.parse_args()
    if given.command == "write":
        counts = write(given.emoji, given.output, given.concepts, given.held_out, given.seed)
        print(f"{counts['train']} training edits and {counts['test']} held-out edits in {given.output}")
    else:
        print(f"{'':24s} concept   style")
        for name, (concept, style) in score(given.checkpoint, given.data, given.guidance, given.images).items():
            print(f"{name:24s} {concept:7.3f} {style:7.3f}")


if __name__ == "__main__":
    main()
