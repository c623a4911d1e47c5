"""Medians of the scores of several runs of launch/quickstart.sh or launch/illume.sh, as a table.

Where the runs have the results of single examples (`outcomes.json`), differences over all runs follow, with 95%
intervals that draw runs and examples (`unimm_jax/evals/bootstrap.py`).

python -m benchmarks.seeds runs/seed0 runs/seed1 runs/seed2
"""

import json
import pathlib
import statistics
import sys

import numpy as np

from unimm_jax.evals.bootstrap import paired_bootstrap
from unimm_jax.evals.score_table import sections

VIEWS = ("small_objects/slices", "small_objects/global_view")
# name of a difference, folder of its outcomes in a run, and the two scores
DIFFERENCES = (
    ("small objects, slices - whole image", "evaluation/small_objects", *VIEWS),
    ("small objects across patches, slices - whole image", "evaluation_across", *VIEWS),
    ("best of 4 - one sample", "evaluation/assessments", "best_of_4/best_of_4", "best_of_4/one_sample"),
)


def main(runs: list[str]) -> None:
    """Prints the median of each score and its values in the order of the runs."""
    found = [json.loads((pathlib.Path(run) / "scores.json").read_text()) for run in runs]

    def row(name: str, values: list[float]) -> None:
        print(f"| {name} | {statistics.median(values):.3f} | {', '.join(f'{v:.3f}' for v in values)} |")

    print("| | median | runs |\n|---|---|---|")
    for section in ("text_to_image", "text_to_image_strict", "questions", "caption"):
        for key in found[0][section]:
            row(f"{section} {key}".replace("_", " "), [scores[section][key] for scores in found])
    for key in ("reconstruction", "reconstruction_random_selection", "tokens_per_image", "tokens_follow_objects"):
        row(key.replace("_", " "), [scores[key] for scores in found])
    evaluators = [sections(scores) for scores in found]
    for number, (title, _, values) in enumerate(evaluators[0]):
        for i, (name, _) in enumerate(values):
            row(f"{title}: {name.strip()}", [seed[number][2][i][1] for seed in evaluators])
    row("minutes", [sum(scores["seconds"].values()) / 60 for scores in found])
    files = [pathlib.Path(run) / "selector" / "metrics.jsonl" for run in runs]
    if files[0].exists():  # ILLUME's tokenizer has no selector
        selector = [file.read_text().splitlines() for file in files]
        for key in ("keep_rate_argmax", "keep_rate_sampled"):
            last = [statistics.mean(json.loads(line)[key] for line in lines[-3:]) for lines in selector]
            row(f"selector {key}, mean of the last three logged steps".replace("_", " "), last)
    for name, folder, first, second in DIFFERENCES:
        outcomes = [pathlib.Path(run) / folder / "outcomes.json" for run in runs]
        if all(file.exists() for file in outcomes):
            right = [json.loads(file.read_text()) for file in outcomes]
            a, b = ([np.array(run[measure]) for run in right] for measure in (first, second))
            print(f"\n{name}: {paired_bootstrap(a, b)}")


if __name__ == "__main__":
    main(sys.argv[1:])
