"""Results of single prompts, questions and scenes on the scenes benchmark, saved for paired comparisons.

python -m benchmarks.claims.scene_scores --checkpoint=runs/stage3 --output=runs/scores

The examples, their order and the sampling are those of `unimm_jax.evals.scenes`, so that results of two models are
paired. `scores.npz` has one array per kind of result.
"""

import argparse
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

PARTS = ("drawing", "questions", "reconstruction")
GUIDANCE = 1.5  # the default of the scenes benchmark


def drawing(generator: Any, prompts: int) -> dict[str, np.ndarray]:
    """Text to image: `drawing` and `drawing_strict` (nothing superfluous), boolean [6 tasks × prompts]."""
    from unimm_jax.evals.scenes import draw_and_judge
    from unimm_jax.inference.sampling import Sampling

    sampling = Sampling(guidance=GUIDANCE, temperature=1.0)
    _, _, verdicts = draw_and_judge(generator, generator.decoder_name(""), prompts, sampling)
    right = np.array(verdicts, bool)
    return {"drawing": right[:, 0], "drawing_strict": right[:, 1]}


def questions(generator: Any, per_kind: int) -> dict[str, np.ndarray]:
    """`questions`: whether each answer is right, boolean; `question_kinds`: strings. Equal numbers of each kind."""
    from unimm_jax.evals.scenes import ask

    asked, _, replies = ask(generator, per_kind, 1.0)
    right = [reply == truth for (_, _, truth, _), reply in zip(asked, replies, strict=True)]
    return {"questions": np.array(right), "question_kinds": np.array([kind for *_, kind in asked])}


def reconstruction(generator: Any, images: int) -> dict[str, np.ndarray]:
    """For each test scene: share of its objects found again in the image decoded from its codes, tokens, objects.

    `reconstruction_random` keeps as many patches, chosen at random, with the same weights.
    """
    from unimm_jax.evals import scene_detector as detector
    from unimm_jax.evals.scenes import EVALUATION_SEED, draw_test_scenes

    test = draw_test_scenes(generator, images, 1.0)
    objects = np.array([len(scene.objects) for scene in test.scenes])

    def found(codes: np.ndarray, keep: np.ndarray) -> np.ndarray:
        decoded = generator.decode(codes, keep)
        right = [detector.objects_right(s, detector.detect(x)) for s, x in zip(test.scenes, decoded, strict=True)]
        return np.array(right) / objects

    order = np.random.default_rng(EVALUATION_SEED).random(test.keep.shape).argsort(-1).argsort(-1)
    random = generator.tokenize(test.images, order < test.keep.sum(-1, keepdims=True))
    return {
        "reconstruction": found(test.codes, test.keep),
        "reconstruction_random": found(*random),
        "tokens": test.keep.sum(-1),
        "objects": objects,
    }


def measure(checkpoint: pathlib.Path, output: pathlib.Path, parts: Sequence[str], sizes: dict[str, int]) -> None:
    """Writes `output/scores.npz`.

    Args:
      sizes: prompts per task ("drawing"), questions per kind ("questions"), test scenes ("reconstruction").
    """
    from benchmarks.claims import stages
    from unimm_jax.inference.generator import Generator
    from unimm_jax.inference.loading import load_model

    began = time.perf_counter()
    generator = Generator(load_model(checkpoint), 64)
    functions = {"drawing": drawing, "questions": questions, "reconstruction": reconstruction}
    found: dict[str, np.ndarray] = {}
    for part in parts:
        found |= functions[part](generator, sizes[part])
    output.mkdir(parents=True, exist_ok=True)
    np.savez(output / "scores.npz", **found)
    stages.write_done(output, time.perf_counter() - began)


def command(folder: pathlib.Path, checkpoint: pathlib.Path, parts: Sequence[str], quick: bool) -> Any:
    """The command that measures a checkpoint, as a `stages.Command`."""
    from benchmarks.claims.stages import Command

    flags = [f"--checkpoint={checkpoint}", f"--output={folder}", "--parts", *parts]
    flags += ["--prompts=2", "--questions=4", "--images=16"] if quick else []
    return Command(folder, "benchmarks.claims.scene_scores", flags, 15.0 + 10 * len(parts))


def main() -> None:
    """Entry point."""
    from unimm_jax import process

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=pathlib.Path, required=True)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--prompts", type=int, default=100, help="per text-to-image task")
    parser.add_argument("--questions", type=int, default=200, help="per kind")
    parser.add_argument("--images", type=int, default=300, help="test scenes for reconstruction")
    flags = parser.parse_args()
    process.prepare()
    sizes = dict(drawing=flags.prompts, questions=flags.questions, reconstruction=flags.images)
    process.run(lambda: measure(flags.checkpoint, flags.output, flags.parts, sizes))


if __name__ == "__main__":
    main()
