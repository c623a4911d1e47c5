"""Which settings of size laptop its image tokenizer needs: each alone on top of LaVIT's published choices.

python -m benchmarks.aids --output=runs/aids --seeds 0 1 2

For each seed it trains an encoder. For each arm it then trains selector, tokenizer and pixel decoder at the size
`laptop-lavit` with the settings of `ARMS`, and decodes 300 test scenes from their codes. It prints the median over the
seeds of the share of the objects that are found again, and of the tokens per image (an image has 16 patches and 2.3
objects). An interrupted run resumes.
"""

import argparse
import functools
import json
import pathlib
import statistics
from typing import Any

import numpy as np

from benchmarks.claims import experiment
from benchmarks.claims.stages import SECONDS, Command, link, pretokenizing, run_all, training
from unimm_jax import resolve

GRID = ("model.image_tokenizer.positions",)
NO_LEAK = ("model.image_tokenizer.eps",)
SINK = ("model.image_tokenizer.sink", "model.image_tokenizer.decoder_sink")
KEEP_RATE = (
    "loss.keep_rate_at",
    "loss.keep_rate",
    "loss.keep_rate_weight",
    "loss.binarization_weight",
    "loss.mask_gradient_clip",
)
# settings that an arm takes from `laptop`; those of the loss are the selector's
ARMS = {
    "laptop-lavit": (),
    "a position before each code": GRID,
    "eps 0": NO_LEAK,
    "attention sinks": SINK,
    "schedule of the keep rate": KEEP_RATE,
    "all (laptop)": GRID + NO_LEAK + SINK + KEEP_RATE,
}
SCENES = 300
SIZE = "laptop-lavit"
STAGES = ("selector", "tokenizer", "records", "pixel_decoder")


def overrides(stage: str, names: tuple[str, ...]) -> dict[str, Any]:
    """The values at `laptop` of those settings that a stage has of an arm's."""
    laptop = resolve.load(f"{stage}:laptop").to_dict()
    used = [name.split(".") for name in names if name.startswith("model.") or stage == "selector"]
    return {".".join(path): functools.reduce(dict.__getitem__, path, laptop) for path in used}


def commands(root: pathlib.Path, seed: int) -> list[Command]:
    """All commands of a seed: the encoder, then selector, tokenizer, records and pixel decoder of every arm."""
    found = [training("encoder", SIZE, root / "encoder", seed, {}, seconds=SECONDS["laptop"]["encoder"])]
    for number, names in enumerate(ARMS.values()):
        folder = root / f"arm{number}"
        link(root / "encoder", folder / "encoder")
        for stage in STAGES:
            if stage == "records":
                found.append(pretokenizing(folder / stage, "laptop", folder / "tokenizer"))
            else:
                seconds = SECONDS["laptop"][stage]
                found.append(training(stage, SIZE, folder / stage, seed, overrides(stage, names), seconds=seconds))
    return found


def score(folder: pathlib.Path) -> dict[str, float]:
    """Objects found again in decoded test scenes, tokens per image, and their rank correlation with the objects."""
    from unimm_jax import objectives
    from unimm_jax.checkpoint import read_meta, read_params
    from unimm_jax.data import scenes
    from unimm_jax.evals.scenes import EVALUATION_SEED, objects_found, rank_correlation
    from unimm_jax.inference.loading import load_image_tokenizer, stage_config
    from unimm_jax.inference.pretokenization import Encoder

    drawn = [scenes.draw_scene(EVALUATION_SEED, "test", i, 1.0) for i in range(SCENES)]
    tokenizer = load_image_tokenizer(folder / "tokenizer")
    images = np.stack([scenes.render(scene, tokenizer.config.data.image_size) for scene in drawn])
    keep, codes = (np.asarray(x) for x in Encoder(tokenizer, SCENES).start(images))
    config = stage_config(read_meta(folder / "pixel_decoder"), folder / "pixel_decoder")
    objective_class = objectives.get(config.objective)
    objective = objective_class(config, objective_class.abstract_input(config))
    decoded = np.asarray(objective.decode(read_params(folder / "pixel_decoder"), codes, keep, None))
    tokens = keep.sum(-1)
    return {
        "objects": objects_found(drawn, decoded),
        "tokens": float(tokens.mean()),
        "correlation": rank_correlation(tokens, [len(scene.objects) for scene in drawn]),
    }


def main() -> None:
    """Entry point."""
    from unimm_jax import process

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=experiment.local_path, default=pathlib.Path("runs/aids"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    flags = parser.parse_args()
    process.prepare()
    output = flags.output.resolve()
    run_all(output, {seed: commands(output / f"seed{seed}", seed) for seed in flags.seeds})
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ARMS}
    for seed in flags.seeds:
        for number, name in enumerate(ARMS):
            found[name].append(score(output / f"seed{seed}" / f"arm{number}"))
            print(f"seed {seed}, {name}: {json.dumps(found[name][-1])}", flush=True)
    print("| arm | objects right | per seed | tokens per image | rank correlation |\n|---|---|---|---|---|")
    for name, scores in found.items():
        objects, tokens, correlation = ([s[key] for s in scores] for key in ("objects", "tokens", "correlation"))
        middle = [statistics.median(values) for values in (objects, tokens, correlation)]
        each = ", ".join(f"{value:.3f}" for value in objects)
        print(f"| {name} | {middle[0]:.3f} | {each} | {middle[1]:.2f} | {middle[2]:.2f} |")


if __name__ == "__main__":
    main()
