"""Questions about emoji as LLaVA JSON: an example of own data that a model learns to answer.

python -m benchmarks.emoji_questions EMOJI OUTPUT [--concepts=400] [--held_out=0.2] [--seed=0]

EMOJI is a directory with `emoji.jsonl`, one row {"image", "name", "category", "style", ...} per image, and the images.
Writes OUTPUT/train/ and OUTPUT/test/ (images with .txt captions), and OUTPUT/train.json and OUTPUT/test.json
(conversations of three questions each: name, category and style of the image). The test images are a share of the
images chosen at random; the other style of a test image is usually among the training images.
"""

import argparse
import json
import pathlib
import random
import shutil
from typing import Any

from benchmarks.claims import experiment


def conversation(row: dict[str, Any]) -> list[dict[str, str]]:
    """The turns about one image."""
    asked = [
        ("<image>\nwhat is this?", row["name"].lower()),
        ("in which category?", row["category"].lower()),
        ("in which style?", row["style"].lower()),
    ]
    return [turn for q, a in asked for turn in ({"from": "human", "value": q}, {"from": "gpt", "value": a})]


def place(emoji: pathlib.Path, folder: pathlib.Path, row: dict[str, Any]) -> None:
    """Copies the image of a row of `emoji.jsonl` to a directory, with a caption of its name and style beside it."""
    file = folder / row["image"]
    file.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(emoji / row["image"], file)
    file.with_suffix(".txt").write_text(f"{row['name'].lower()}, {row['style'].lower()}\n")


def write(emoji: pathlib.Path, output: pathlib.Path, concepts: int, held_out: float, seed: int) -> dict[str, int]:
    """Writes images, captions and conversations: number of images by split."""
    rows = [json.loads(line) for line in (emoji / "emoji.jsonl").read_text().splitlines()]
    names = sorted({row["name"] for row in rows})
    rng = random.Random(seed)
    chosen = set(rng.sample(names, min(concepts, len(names))))
    rows = [row for row in rows if row["name"] in chosen]
    rng.shuffle(rows)
    test = round(len(rows) * held_out)
    for split, part in (("test", rows[:test]), ("train", rows[test:])):
        found = []
        for row in sorted(part, key=lambda row: row["image"]):
            place(emoji, output / split, row)
            found.append({"id": row["image"], "image": f"{split}/{row['image']}", "conversations": conversation(row)})
        (output / f"{split}.json").write_text(json.dumps(found, indent=1))
    return {"train": len(rows) - test, "test": test}


def main() -> None:
    """Writes the files and prints how many."""
    parser = argparse.ArgumentParser()
    parser.add_argument("emoji", type=pathlib.Path)
    parser.add_argument("output", type=experiment.local_path)
    parser.add_argument("--concepts", type=int, default=400)
    parser.add_argument("--held_out", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    counts = write(given.emoji, given.output, given.concepts, given.held_out, given.seed)
    print(f"{counts['train']} training images and {counts['test']} held-out images in {given.output}")


if __name__ == "__main__":
    main()
