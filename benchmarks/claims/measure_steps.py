"""Scores every saved step of a language stage: codes given captions, and at the last steps text to image.

python -m benchmarks.claims.measure_steps --run=runs/S --output=runs/S/steps

The steps are the checkpoints of `RUN/stage2`, counted from the start of stage 1. The end of stage 1 is left out: that
stage has no text to image, so the model does not know what follows [IMG] alone, and its gain would mean nothing. Each
step gets `OUTPUT/STEP.npz`; a step that has one is not scored again.
"""

import argparse
import json
import pathlib
import time

import numpy as np


def checkpoints_of(run: pathlib.Path) -> list[tuple[int, pathlib.Path]]:
    """(step since the start of stage 1, checkpoint) of every saved step of stage 2."""
    from unimm_jax.checkpoint import find

    before = int(find(run / "stage1").name)
    saved = sorted(int(p.name) for p in (run / "stage2" / "checkpoints").iterdir() if p.name.isdigit())
    return [(before + step, run / "stage2" / "checkpoints" / str(step)) for step in saved]


def measure(run: pathlib.Path, output: pathlib.Path, images: int, drawn: int, prompts: int) -> None:
    """Scores the steps.

    Args:
      images: held-out images. drawn: number of last steps that also draw `prompts` prompts of each task.
    """
    from benchmarks.claims import stages
    from benchmarks.claims.code_scores import CodeScorer
    from benchmarks.claims.scene_scores import drawing
    from unimm_jax import sharding
    from unimm_jax.checkpoint import read_params
    from unimm_jax.inference.generator import Generator
    from unimm_jax.inference.loading import load_model

    began = time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)
    model = load_model(run / "stage2")
    shardings = dict(sharding.flatten(sharding.param_shardings(model.objective.abstract, model.mesh)))
    scorer, generator = CodeScorer(model, run / "records", images), Generator(model, 64)
    found = checkpoints_of(run)
    for number, (step, checkpoint) in enumerate(found):
        file = output / f"{step:06d}.npz"
        if file.exists():
            continue
        params = read_params(checkpoint, shardings)
        scores = scorer.score(params)
        arrays = dict(cross_entropy=scores.cross_entropy, gain=scores.gain, matched=scores.matched)
        if number >= len(found) - drawn:
            generator.params = params
            arrays |= drawing(generator, prompts)
        np.savez(output / "partial.npz", **arrays)
        (output / "partial.npz").rename(file)
        print(f"step {step}: gain {scores.gain.mean():.3f}, matched {scores.matched.mean():.3f}", flush=True)
    tokenizer = dict(entropy=scorer.entropy, used=scorer.used, codes_per_image=scorer.codes_per_image)
    (output / "codes.json").write_text(json.dumps(tokenizer))
    stages.write_done(output, time.perf_counter() - began)


def main() -> None:
    """Entry point."""
    from unimm_jax import process

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=pathlib.Path, required=True)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--drawn", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=100, help="per text-to-image task")
    flags = parser.parse_args()
    process.prepare()
    process.run(lambda: measure(flags.run, flags.output, flags.images, flags.drawn, flags.prompts))


if __name__ == "__main__":
    main()
