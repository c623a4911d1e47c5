"""How well edits are learned with the image before the instruction and after it.

python -m benchmarks.edit_layout --run=runs/illume --output=runs/edit_layout

From stage 2 of a run of `launch/illume.sh`, it trains on the edits of scenes alone for 800 steps of 20 examples, once
with `data.image_prompts="features"` (image first) and once with "features_last", and prints the held-out cross-entropy
of the codes. Both run at the same time. An interrupted run resumes.
"""

import argparse
import pathlib

from benchmarks.claims import experiment
from benchmarks.claims.stages import run_all, training
from unimm_jax import metrics

LAYOUTS = ("features", "features_last")
SECONDS = 160  # estimate for each


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=pathlib.Path, required=True, help="with the records, and stage 2")
    parser.add_argument("--output", type=experiment.local_path, default=pathlib.Path("runs/edit_layout"))
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    run, output = flags.run.resolve(), flags.output.resolve()
    settings = {
        "train.steps": 800,
        "train.batch_size": 20,
        "data.seq_len": 160,
        "data.records": str(run / "records"),
        "data.mixture": ({"source": "scene_edits"},),
        "init_from": ({"checkpoint": str(run / "stage2"), "rename": (("", ""),)},),
    }
    commands = {}
    for number, layout in enumerate(LAYOUTS):
        chosen = settings | {"data.image_prompts": layout}
        found = training("stage2", "laptop-illume", output / layout, flags.seed, chosen, seconds=SECONDS)
        commands[number] = [found]
    run_all(output, commands, lanes=len(LAYOUTS))
    print("| layout | held-out cross-entropy of the codes |\n|---|---|")
    for layout in LAYOUTS:
        last = metrics.read(output / layout, "evals.jsonl")[-1]
        print(f"| {layout} | {last['code_ce']:.3f} |")


if __name__ == "__main__":
    main()
