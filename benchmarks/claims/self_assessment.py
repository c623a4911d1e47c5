"""ILLUME's claim that assessments of the model's own images lift understanding and generation (Table 7).

python -m benchmarks.claims.self_assessment --output=runs/self_assessment --seeds 0 1 2
python -m benchmarks.claims.self_assessment --runs runs/quickstart runs/seed1 runs/seed2 --output=runs/self_assessment

A finished stage 3 of size `laptop` draws images for a fifth of the training captions, and the exact judge of the scenes
assesses them. Stage 3 then continues from the same checkpoint with one of: more of the same data (extra); a tenth of
assessments of own images (own); these with the verdicts of other images (shuffled); assessments of images that the
model of another seed drew for the same captions (other); own assessments without corrections (no_correction). With
--runs, the stages of finished quickstarts are used, one run for each seed. docs/claims.md has the prediction and the
criterion. An interrupted run resumes.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.claims import assessment_documents, experiment, plots, quickstart, scene_scores
from benchmarks.claims.stages import QUICK, SECONDS, Command, link_finished, run_all, steps_of, training
from unimm_jax.evals.bootstrap import Difference, paired_bootstrap

SIZE = quickstart.SIZE
NEEDED = ("tokenizer", "records", "pixel_decoder", "stage3")  # of a finished run
ARMS = ("own", "extra", "shuffled", "other", "no_correction")
MEASURES = {"questions": "questions", "drawing": "text to image", "drawing_strict": "text to image, strict"}
JUDGED = ("questions", "drawing")  # measures of the criterion
AGAINST = ("extra", "shuffled")  # arms of the criterion
SHARE = 0.2  # of the training records, for which images are drawn
MAX_BAD_SHARE = 0.6  # of the documents
WEIGHT = 0.1  # of the assessments among the examples
STEPS = 1200
RATE = 0.5  # learning rates, relative to those of stage 3
WARMUP = 0.05  # share of the steps
ROWS = {"data.seq_len": 128, "data.images_per_row": 6}  # a document with a correction does not fit into 64 tokens
ASSESSED = 200  # images of the evaluator `assessments`
AGREEMENT = tuple(f"assessment_{x}" for x in ("agreement", "agreement_by_side", "agreement_by_category", "unparsed"))
SLOWER = 1.2  # estimate: a step with rows of 128 tokens, relative to one of stage 3


def base_commands(root: pathlib.Path, seed: int, quick: bool, existing: pathlib.Path | None) -> list[Command]:
    """The commands that train the model of a seed up to stage 3; links to the stages of `existing` if it is given.

    Raises:
      SystemExit: `existing` lacks a stage.
    """
    if existing is None:
        return quickstart.commands(root, seed, quick)
    for name in NEEDED:
        link_finished(existing, name, root / name)
    return []


def assessment_commands(
    root: pathlib.Path, painter: pathlib.Path, drawings: pathlib.Path, documents: pathlib.Path, quick: bool
) -> list[Command]:
    """The commands that draw, judge and build documents for the captions in `root`.

    Args:
      painter: directory of the seed whose model draws. drawings, documents: directories to write.
    """
    most = 1.0 if quick else MAX_BAD_SHARE  # all images of a model that was hardly trained are bad
    draw = [f"--checkpoint={painter / 'stage3'}", f"--records={root / 'records'}", f"--output={drawings}"]
    draw += [f"--share={SHARE}", "--source=scenes"]
    make = [f"--drawings={drawings}", f"--records={root / 'records'}", f"--output={documents}"]
    module = "unimm_jax.self_enhance"
    return [
        Command(drawings, module, ["generate", *draw], 60),
        Command(drawings / "verdicts", module, ["assess", f"--drawings={drawings}", "--judge=scenes"], 15),
        Command(documents, module, ["build", *make, f"--max_bad_share={most}"], 10),
    ]


def document_commands(
    root: pathlib.Path, seed: int, arms: Sequence[str], partner: pathlib.Path | None, quick: bool
) -> list[Command]:
    """The commands that write the documents of all arms but `extra`, each to `documents_ARM`.

    Args:
      partner: directory of the seed whose model draws for the arm `other`.
    """
    found = assessment_commands(root, root, root / "drawings", root / "documents_own", quick)
    if partner is not None and "other" in arms:
        found += assessment_commands(root, partner, root / "drawings_other", root / "documents_other", quick)
    for kind in assessment_documents.KINDS:
        if kind in arms:
            given = dict(documents=root / "documents_own", drawings=root / "drawings", records=root / "records")
            flags = [f"--{name}={value}" for name, value in given.items()]
            folder = root / f"documents_{kind}"
            flags += [f"--kind={kind}", f"--output={folder}", f"--seed={seed}"]
            found.append(Command(folder, "benchmarks.claims.assessment_documents", flags, 10))
    return found


def records_command(root: pathlib.Path, arm: str, quick: bool) -> Command:
    """The command that writes the records of the training data and the documents of an arm, to `records_ARM`."""
    sources = QUICK["data.sources"] if quick else "scenes"
    folder = root / f"records_{arm}"
    flags = [f"--image_tokenizer={root / 'tokenizer'}", f"--text_tokenizer={root / 'stage3'}", f"--output={folder}"]
    flags.append(f"--sources={sources};chat:{root / f'documents_{arm}' / 'documents.jsonl'}")
    return Command(folder, "unimm_jax.pretokenize", flags, SECONDS[SIZE]["records"] * 1.3)


def arm_settings(arm: str, quick: bool) -> dict[str, Any]:
    """Settings of an arm's stage that differ from those of stage 3.

    The arms differ in the records and in the mixture. The shares of the tasks are those at the end of stage 3.
    """
    from configs import common
    from unimm_jax import resolve

    given = resolve.load(f"stage3:{SIZE}").to_dict()
    settings: dict[str, Any] = {"init_from": (common.start_from("stage3"),)} | ROWS
    settings |= {f"data.tasks.{task}": share for task, share in given["data"]["tasks_end"].items()}
    rates = ("learning_rate", "muon_learning_rate")
    settings |= {f"optimizer.{name}": given["optimizer"][name] * RATE for name in rates}
    settings |= {"optimizer.warmup": WARMUP}
    # A selector that was hardly trained keeps all patches.
    settings |= {"data.seq_len": 512} if quick else {"train.steps": STEPS}
    if arm == "extra":
        mixture: tuple[dict[str, Any], ...] = (dict(source="scenes", weight=1.0),)
        return settings | {"data.records": "../records_own", "data.mixture": mixture}
    mixture = (dict(source="scenes", weight=1 - WEIGHT), dict(source="chat", weight=WEIGHT))
    return settings | {"data.records": f"../records_{arm}", "data.mixture": mixture}


def agreement_command(folder: pathlib.Path, checkpoint: pathlib.Path, quick: bool) -> Command:
    """The command that compares the verdicts of a checkpoint with those of the exact judge."""
    flags = [f"--checkpoint={checkpoint}", f"--output={folder}", "--evals=assessments", "--best_of=1"]
    return Command(folder, "unimm_jax.evaluate", [*flags, f"--drawings={8 if quick else ASSESSED}"], 40)


def arm_commands(
    root: pathlib.Path, seed: int, arms: Sequence[str], partner: pathlib.Path | None, quick: bool
) -> list[Command]:
    """All commands of a seed after its stage 3, in order.

    Args:
      partner: directory of the seed whose model draws for the arm `other`.
    """
    found = document_commands(root, seed, arms, partner, quick)
    found += [records_command(root, arm, quick) for arm in arms if arm != "extra"]
    seconds = SECONDS[SIZE]["stage3"] * STEPS / steps_of("stage3", SIZE, False) * SLOWER
    found.append(scene_scores.command(root / "scores_base", root / "stage3", ["drawing", "questions"], quick))
    for arm in arms:
        folder = root / f"stage3_{arm}"
        found.append(training("stage3", SIZE, folder, seed, arm_settings(arm, quick), quick, seconds))
        found.append(scene_scores.command(root / f"scores_{arm}", folder, ["drawing", "questions"], quick))
        found.append(agreement_command(root / f"agreement_{arm}", folder, quick))
    return found


# ---- Results ---------------------------------------------------------------------------------------------------------


def compare(scores: Mapping[str, list[Mapping[str, np.ndarray]]]) -> dict[str, Difference]:
    """Differences own - another arm, by name."""
    return {
        f"own - {arm}, {measure}": paired_bootstrap(*[[s[measure] for s in scores[name]] for name in ("own", arm)])
        for arm in scores
        if arm not in ("own", "base")
        for measure in MEASURES
    }


def judged(compared: Mapping[str, Difference]) -> str:
    """What the criterion of docs/claims.md says."""
    wanted = [f"own - {arm}, {measure}" for arm in AGAINST for measure in JUDGED]
    missing = [name for name in wanted if not compared[name].is_above_zero]
    if not missing:
        return "met: all four differences are above 0"
    found = "; ".join(f"{name}: {compared[name].verdict}" for name in missing)
    return f"not met: {found}"


def per_seed(values: Sequence[float]) -> str:
    """A cell with a value of each seed."""
    return ", ".join(f"{value:.3f}" for value in values)


def agreement_row(arm: str, found: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """A row of the table of agreement with the exact judge; "-" where there were no images of a side."""
    columns = [[s["assessment_agreement"] for s in found]]
    columns += [[s["assessment_agreement_by_side"].get(side) for s in found] for side in ("right", "wrong")]
    columns += [[s["assessment_unparsed"] for s in found]]
    return (arm, *(", ".join(map(experiment.cell, column)) for column in columns))


def report(output: pathlib.Path, seeds: Sequence[int], arms: Sequence[str]) -> None:
    """Reads all results and writes tables and numbers."""
    folders = [output / f"seed{seed}" for seed in seeds]
    names = ("base", *arms)
    scores = {name: [dict(np.load(f / f"scores_{name}" / "scores.npz")) for f in folders] for name in names}
    agreement = {
        arm: [json.loads((f / f"agreement_{arm}" / "scores.json").read_text()) for f in folders] for arm in arms
    }
    documents = {
        arm: [assessment_documents.count(assessment_documents.read(f / f"documents_{arm}")) for f in folders]
        for arm in arms
        if arm != "extra"
    }
    compared = compare(scores)
    means = {name: [{m: float(s[m].mean()) for m in MEASURES} for s in found] for name, found in scores.items()}
    rows = [(name, *(per_seed([s[m] for s in found]) for m in MEASURES)) for name, found in means.items()]
    kinds = ("documents", "good", "corrections")
    counts = [(arm, *(", ".join(str(c[k]) for c in found) for k in kinds)) for arm, found in documents.items()]
    judged_by = ("arm", "agreement", "right images", "wrong images", "no verdict")
    sections = {
        "Scores of each seed": experiment.table(("arm", *MEASURES.values()), rows),
        "Differences": experiment.comparison_table(compared),
        "Criterion": judged(compared),
        "Agreement with the exact judge": experiment.table(judged_by, [agreement_row(*x) for x in agreement.items()]),
        "Documents of each seed": experiment.table(("arm", *kinds), counts),
    }
    judgements = {arm: [{k: v for k, v in s.items() if k in AGREEMENT} for s in f] for arm, f in agreement.items()}
    numbers = dict(seeds=seeds, scores=means, comparisons=compared, criterion=judged(compared), documents=documents)
    title = "Self-assessment (ILLUME, Table 7)"
    pictures = {"differences": plots.differences(title, compared)}
    experiment.write(output, title, sections, numbers | dict(agreement=judgements), pictures)


def partners(seeds: Sequence[int]) -> dict[int, int]:
    """Seed → the seed whose model draws for its arm `other`: the next one; nothing for a single seed."""
    return {seed: seeds[(i + 1) % len(seeds)] for i, seed in enumerate(seeds)} if len(seeds) > 1 else {}


def main() -> None:
    """Entry point."""
    parser = experiment.parser(__doc__, "runs/self_assessment")
    parser.add_argument("--runs", type=pathlib.Path, nargs="+", help="finished quickstarts, one for each seed")
    flags = experiment.read_flags(parser)
    existing = {seed: run.resolve() for seed, run in zip(flags.seeds, flags.runs or (), strict=False)}
    partner = partners(flags.seeds)
    arms = ARMS if partner else tuple(arm for arm in ARMS if arm != "other")
    if not partner:
        print("a single seed: the arm `other` needs the model of another seed and is left out", flush=True)
    output = experiment.prepare(flags.output, "self_assessment", flags.quick, seeds=flags.seeds, runs=existing)
    roots = {seed: output / f"seed{seed}" for seed in flags.seeds}
    bases = {s: base_commands(root, s, flags.quick, existing.get(s)) for s, root in roots.items()}
    if any(bases.values()):
        run_all(output, bases, flags.lanes)
    by_seed = {
        s: arm_commands(root, s, arms, roots[partner[s]] if partner else None, flags.quick) for s, root in roots.items()
    }
    run_all(output, by_seed, flags.lanes)
    report(output, flags.seeds, arms)


if __name__ == "__main__":
    main()
