"""ILLUME's claim that one model for drawing and answering is as good as a specialist for each (Table 2).

python -m benchmarks.claims.joint_training --output=runs/joint_training --seeds 0 1 2
python -m benchmarks.claims.joint_training --runs runs/quickstart runs/seed1 runs/seed2 --output=runs/joint_training

Stage 3 of size `laptop` starts three times from the same stage 2: joint (the config as it is), drawing only, answering
only (questions and captions). A specialist sees as many examples of its tasks as the joint model does, in fewer steps.
With --equal_steps, each specialist is also trained for all steps of the joint model. With --runs, stages of finished
quickstarts are used, one run for each seed. docs/claims.md has the prediction and the criterion. An interrupted run
resumes.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.claims import experiment, plots, quickstart, scene_scores
from benchmarks.claims.stages import SECONDS, Command, link, link_finished, run_all, training
from unimm_jax.evals.bootstrap import Difference, paired_bootstrap

SIZE = quickstart.SIZE
BEFORE = quickstart.STAGES[:-1]  # up to stage2
NEEDED = ("tokenizer", "records", "pixel_decoder", "stage2")  # of a finished run
TASKS = {"drawing": ("text_to_image",), "answering": ("question", "caption")}
ARMS = ("joint", "drawing", "answering")
EQUAL_STEPS = ("drawing_equal_steps", "answering_equal_steps")
SCORES = {"drawing": "drawing_strict", "answering": "questions"}
MARGIN = 0.05  # of the criterion: largest loss that counts as neutral


def examples_by_task(config: Any, records: int) -> dict[str, float]:
    """Expected number of examples of each task of scenes in a run of stage 3.

    Args:
      config: of the stage, with a batch in examples. records: number of training records.
    """
    from unimm_jax.data.pipeline import packing_config

    packing, names = packing_config(config), [task for tasks in TASKS.values() for task in tasks]
    found = dict.fromkeys(names, 0.0)
    drawn, batch = 0, config.train.batch_size
    for _ in range(config.train.steps):
        shares = {task: share for task, share in packing.shares(drawn // records).items() if task in found}
        for task, share in shares.items():
            found[task] += batch * share / sum(shares.values())
        drawn += batch
    return found


def specialist_settings(kind: str, config: Any, records: int, equal_steps: bool) -> dict[str, Any]:
    """Settings of a specialist's stage 3: the other tasks have share 0, and the steps are scaled.

    Args:
      kind: "drawing" or "answering". config: of the joint stage.
    """
    mine = TASKS[kind]
    others = [task for tasks in TASKS.values() for task in tasks if task not in mine]
    settings: dict[str, Any] = {f"data.{when}.{task}": 0.0 for when in ("tasks", "tasks_end") for task in others}
    if not equal_steps:
        examples = examples_by_task(config, records)
        steps = sum(examples[task] for task in mine) / config.train.batch_size
        settings["train.steps"] = max(round(steps), 1)
    return settings


def stage_settings(arm: str, folder: pathlib.Path, quick: bool) -> dict[str, Any]:
    """Settings of an arm's stage 3 that differ from the config; reads the number of records."""
    from benchmarks.claims.stages import QUICK, overrides_of
    from unimm_jax import resolve
    from unimm_jax.data.records import Records

    if arm == "joint":
        return {}
    given = resolve.load(f"stage3:{SIZE}")
    if quick:
        given.update_from_flattened_dict(overrides_of("stage3", SIZE, QUICK))
    kind = arm.partition("_")[0]
    return specialist_settings(kind, resolve.parse(given), len(Records(folder / "records")), arm in EQUAL_STEPS)


def commands(
    root: pathlib.Path, seed: int, arms: Sequence[str], quick: bool, existing: pathlib.Path | None = None
) -> list[Command]:
    """All commands of a seed, in order.

    Args:
      existing: a finished quickstart whose stages are used; its stage 3 is the joint arm.
    """
    if existing is None:
        found = quickstart.commands(root, seed, quick, BEFORE)
    else:
        found = []
        for name in NEEDED:
            link_finished(existing, name, root / name)
        if (existing / "stage3" / "done.json").exists():
            link(existing / "stage3", root / "stage3_joint")
    share = {"joint": 1.0, "drawing": 0.3, "answering": 0.75}
    for arm in arms:
        folder = root / f"stage3_{arm}"

        def settings(arm: str = arm) -> Mapping[str, Any]:
            return stage_settings(arm, root, quick)

        seconds = SECONDS[SIZE]["stage3"] * share.get(arm, 1.0)
        found.append(training("stage3", SIZE, folder, seed, settings, quick, seconds))
        parts = {"drawing": ["drawing"], "answering": ["questions"]}.get(
            arm.partition("_")[0], ["drawing", "questions"]
        )
        found.append(scene_scores.command(root / f"scores_{arm}", folder, parts, quick))
    return found


# ---- Results ---------------------------------------------------------------------------------------------------------


def compare(scores: Mapping[str, list[Mapping[str, np.ndarray]]]) -> dict[str, Difference]:
    """Differences joint - specialist, by name."""
    found = {}
    for arm in scores:
        if arm != "joint":
            measure = SCORES[arm.partition("_")[0]]
            values = [[seed[measure] for seed in scores[name]] for name in ("joint", arm)]
            found[f"joint - {arm}, {measure}"] = paired_bootstrap(*values)
    return found


def judged(difference: Difference) -> str:
    """What the criterion of docs/claims.md says of a difference joint - specialist."""
    if difference.low > 0:
        return "joint training helps"
    if difference.low > -MARGIN:
        return f"neutral: the joint model loses less than {MARGIN}"
    if difference.high < -MARGIN:
        return f"joint training costs more than {MARGIN}"
    return "undecided: the interval contains losses above and below the margin"


def report(output: pathlib.Path, seeds: Sequence[int], arms: Sequence[str]) -> None:
    """Reads all results and writes tables and numbers."""
    scores = {
        arm: [dict(np.load(output / f"seed{seed}" / f"scores_{arm}" / "scores.npz")) for seed in seeds] for arm in arms
    }
    compared = compare(scores)
    rows = []
    for arm, found in scores.items():
        means = {name: [float(s[name].mean()) for s in found] for name in SCORES.values() if name in found[0]}
        cells = [", ".join(f"{x:.3f}" for x in means[n]) if n in means else None for n in SCORES.values()]
        rows.append((arm, *cells))
    conclusions = {name: judged(difference) for name, difference in experiment.labeled(compared).items()}
    sections = {
        "Scores of each seed": experiment.table(("arm", "text to image, strict", "questions"), rows),
        "Differences": experiment.comparison_table(compared),
        "Criterion": "\n".join(f"- {name}: {text}" for name, text in conclusions.items()),
    }
    means = {
        arm: [{name: float(values.mean()) for name, values in s.items() if values.dtype == bool} for s in found]
        for arm, found in scores.items()
    }
    numbers = dict(seeds=seeds, scores=means, comparisons=compared, criterion=conclusions)
    title = "Joint training (ILLUME, Table 2)"
    pictures = {"differences": plots.differences(title, compared)}
    experiment.write(output, title, sections, numbers, pictures)


def main() -> None:
    """Entry point."""
    parser = experiment.parser(__doc__, "runs/joint_training")
    parser.add_argument("--equal_steps", action="store_true", help="also specialists with the joint model's steps")
    parser.add_argument("--runs", type=pathlib.Path, nargs="+", help="finished quickstarts, one for each seed")
    flags = experiment.read_flags(parser)
    arms = (*ARMS, *(EQUAL_STEPS if flags.equal_steps else ()))
    existing = dict(zip(flags.seeds, flags.runs or (), strict=False))
    output = experiment.prepare(flags.output, "joint_training", flags.quick)
    by_seed = {
        seed: commands(output / f"seed{seed}", seed, arms, flags.quick, existing.get(seed)) for seed in flags.seeds
    }
    run_all(output, by_seed, flags.lanes)
    report(output, flags.seeds, arms)


if __name__ == "__main__":
    main()
