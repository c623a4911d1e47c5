"""Which settings of size laptop its image tokenizer needs: each alone on top of LaVIT's published choices.

python -m benchmarks.aids --output=runs/aids --seeds 0 1 2

For each seed it trains an encoder. For each arm it then trains selector, tokenizer and pixel decoder at the size
`laptop-lavit` with the settings of `ARMS`, and decodes 300 test scenes from their codes. It prints the median over the
seeds of the share of the objects that are found again, and of the tokens per image (an image has 16 patches and 2.3
objects). An interrupted run resumes. One arm takes about 4 minutes per seed on two cores of an AMD EPYC of family 25.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys

import numpy as np

GRID = {"model.image_tokenizer.positions": "grid"}
NO_LEAK = {"model.image_tokenizer.eps": 0.0}
SINK = {"model.image_tokenizer.sink": 1.0, "model.image_tokenizer.decoder_sink": 1.0}
KEEP_RATE = {
    "loss.keep_rate_at": (0.0, 0.3, 0.5, 0.7),
    "loss.keep_rate": (1.0, 0.35, 0.35, 0.15),
    "loss.keep_rate_weight": 8.0,
    "loss.binarization_weight": 8.0,
    "loss.mask_gradient_clip": 0.01,
}
# settings of the stages that have them; settings of the loss are those of the selector
ARMS = {
    "laptop-lavit": {},
    "a position before each code": GRID,
    "eps 0": NO_LEAK,
    "attention sinks": SINK,
    "schedule of the keep rate": KEEP_RATE,
    "all (laptop)": GRID | NO_LEAK | SINK | KEEP_RATE,
}
SCENES = 300


def train_arm(folder: pathlib.Path, encoder: pathlib.Path, seed: int, settings: dict[str, object]) -> None:
    """Trains selector, tokenizer and pixel decoder in a folder, from a trained encoder."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "encoder").exists():
        (folder / "encoder").symlink_to(encoder)
    for stage in ("selector", "tokenizer", "records", "pixel_decoder"):
        if (folder / stage / "done.json").exists():
            continue
        if stage == "records":
            run("pretokenize", f"--image_tokenizer={folder / 'tokenizer'}", f"--output={folder / 'records'}")
            continue
        used = {k: v for k, v in settings.items() if k.startswith("model.") or stage == "selector"}
        train(stage, folder / stage, seed, *[f"--config.{k}={v}" for k, v in used.items()])


def train(stage: str, workdir: pathlib.Path, seed: int, *settings: str) -> None:
    """Trains a stage as a user would."""
    run("main", f"--config={stage}:laptop-lavit", f"--workdir={workdir}", f"--config.seed={seed}", *settings)


def run(module: str, *arguments: str) -> None:
    """Runs a command of the package."""
    subprocess.run([sys.executable, "-m", f"unimm_jax.{module}", *arguments], check=True)


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
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/aids"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    flags = parser.parse_args()
    process.prepare()
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ARMS}
    for seed in flags.seeds:
        root = flags.output.resolve() / f"seed{seed}"
        train("encoder", root / "encoder", seed)
        for number, (name, settings) in enumerate(ARMS.items()):
            train_arm(root / f"arm{number}", root / "encoder", seed, settings)
            found[name].append(score(root / f"arm{number}"))
            print(f"seed {seed}, {name}: {json.dumps(found[name][-1])}", flush=True)
    print("| arm | objects right | per seed | tokens per image | rank correlation |\n|---|---|---|---|---|")
    for name, scores in found.items():
        objects, tokens, correlation = ([s[key] for s in scores] for key in ("objects", "tokens", "correlation"))
        middle = [statistics.median(values) for values in (objects, tokens, correlation)]
        each = ", ".join(f"{value:.3f}" for value in objects)
        print(f"| {name} | {middle[0]:.3f} | {each} | {middle[1]:.2f} | {middle[2]:.2f} |")


if __name__ == "__main__":
    main()
