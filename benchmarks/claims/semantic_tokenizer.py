"""ILLUME's claim that a tokenizer with semantic features speeds up the alignment of images and text (Fig. 6).

python -m benchmarks.claims.semantic_tokenizer --output=runs/semantic_tokenizer --seeds 0 1 2

Arms: S, size `laptop-illume` as it is (frozen text-aligned encoder, feature loss); P, an encoder from scratch and a
pixel loss (VQGAN); P2, the frozen encoder and a pixel loss. Only the codes differ: all arms read images through the
same frozen encoder and start from the same text stage. docs/claims.md has the prediction and the criterion. An
interrupted run resumes.
"""

import json
import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.claims import experiment, plots, scene_scores
from benchmarks.claims.code_scores import GROUP
from benchmarks.claims.stages import (
    QUICK,
    ROOT,
    SECONDS,
    Command,
    flags_of,
    link,
    overrides_of,
    pretokenizing,
    run_all,
    steps_of,
    training,
)
from benchmarks.claims.thresholds import steps_to
from unimm_jax.evals.bootstrap import Difference, paired_bootstrap

SIZE = "laptop-illume"
ARMS = ("S", "P", "P2")
POINTS = 20  # checkpoints of stage 2; scenes are learned early
MOST = 0.9  # share of P's last value, for a second threshold that a slow rise at the end does not move
RATIO = 0.5  # of the criterion: largest share of P's steps
LEARNED = 2 / GROUP  # of the criterion: smallest final matching of the other arm, twice that of chance
START = (
    dict(checkpoint="../encoder", rename=[("encoder/", "encoder/")]),
    dict(checkpoint="../text", rename=[("", "")]),
)
PIXEL_CONFIG = ROOT / "benchmarks" / "claims" / "pixel_tokenizer_config.py"
MEASURES = ("gain", "matched", "drawing", "drawing_strict")


def tokenizer_commands(arm: str, folder: pathlib.Path, seed: int, quick: bool) -> list[Command]:
    """The commands that train the image tokenizer of an arm."""
    if arm == "S":
        return [training("tokenizer", SIZE, folder / "tokenizer", seed, {}, quick)]
    small: dict[str, Any] = {}
    if quick:
        small = overrides_of("tokenizer", SIZE, QUICK)
        small |= {name: value for name, value in QUICK.items() if name.startswith("model.pixel_decoder.")}
    # seconds of a step; pixels cost more than features
    each = SECONDS[SIZE]["tokenizer"] * 1.3 / steps_of("tokenizer", SIZE, False)

    def pixel_training(name: str, kind: str, seconds: float) -> Command:
        flags = [f"--config={PIXEL_CONFIG}:{kind}", f"--workdir={folder / name}", *flags_of({"seed": seed} | small)]
        return Command(folder / name, "benchmarks.claims.train_pixel_tokenizer", flags, seconds)

    found = [pixel_training("pixel_start", f"{arm}_start", each * steps_of("encoder", SIZE, False))]
    found.append(pixel_training("pixel_tokenizer", arm, each * steps_of("tokenizer", SIZE, False)))
    extract = [f"--pixel_tokenizer={folder / 'pixel_tokenizer'}", f"--output={folder / 'tokenizer'}"]
    return [*found, Command(folder / "tokenizer", "benchmarks.claims.extract_image_tokenizer", extract, 8)]


def language_settings(stage: str, quick: bool) -> dict[str, Any]:
    """Settings of a language stage that differ from size `laptop-illume`; the same for all arms."""
    if stage == "stage1":
        return {"init_from": START}
    every = steps_of(stage, SIZE, quick) // (2 if quick else POINTS)
    return {"train.checkpoint_every": max(every, 1), "train.keep": POINTS}


def arm_commands(arm: str, root: pathlib.Path, seed: int, quick: bool) -> list[Command]:
    """The commands of an arm, after encoder and text stage."""
    folder = root / arm
    found = tokenizer_commands(arm, folder, seed, quick)
    words = "" if arm == "S" else str(root / "text")
    found.append(pretokenizing(folder / "records", SIZE, folder / "tokenizer", words))
    found.append(training("pixel_decoder", SIZE, folder / "pixel_decoder", seed, {}, quick))
    for stage in ("stage1", "stage2"):
        found.append(training(stage, SIZE, folder / stage, seed, language_settings(stage, quick), quick))
    flags = [f"--run={folder}", f"--output={folder / 'steps'}"]
    flags += ["--images=16", "--drawn=1", "--prompts=1"] if quick else []
    found.append(Command(folder / "steps", "benchmarks.claims.measure_steps", flags, 220))
    found.append(scene_scores.command(folder / "scores", folder / "stage2", ["reconstruction"], quick))
    return found


def commands(root: pathlib.Path, seed: int, arms: Sequence[str], quick: bool) -> list[Command]:
    """All commands of a seed, in order. The text stage reads the records of S, whose texts are those of every arm."""
    for arm in arms:
        for shared in ("encoder", "text"):
            link(root / shared, root / arm / shared)
    by_arm = {arm: arm_commands(arm, root, seed, quick) for arm in arms}
    found = [training("encoder", SIZE, root / "encoder", seed, {}, quick)]
    first = by_arm.pop("S")
    found += first[:2]  # tokenizer and records
    found.append(training("text", SIZE, root / "text", seed, {"data.records": root / "S" / "records"}, quick))
    return [*found, *first[2:], *(command for rest in by_arm.values() for command in rest)]


# ---- Results ---------------------------------------------------------------------------------------------------------


def read(folder: pathlib.Path) -> dict[str, Any]:
    """The results of an arm and a seed: `steps`, `at` (step → arrays), `codes` and `reconstruction`."""
    files = sorted((folder / "steps").glob("[0-9]*.npz"))
    return {
        "steps": [int(file.stem) for file in files],
        "at": {int(file.stem): dict(np.load(file)) for file in files},
        "codes": json.loads((folder / "steps" / "codes.json").read_text()),
        "reconstruction": np.load(folder / "scores" / "scores.npz")["reconstruction"],
    }


def curve(result: Mapping[str, Any], measure: str) -> list[float]:
    """Mean of a measure at every step."""
    return [float(result["at"][step][measure].mean()) for step in result["steps"]]


def relative(result: Mapping[str, Any]) -> list[float]:
    """Cross-entropy per code given the caption, as a share of the unigram entropy, at every step."""
    codes = result["codes"]
    whole = codes["codes_per_image"] * max(codes["entropy"], 1e-9)
    return [x / whole for x in curve(result, "cross_entropy")]


def step_ratio(fast: Mapping[str, Any], slow: Mapping[str, Any], measure: str) -> float:
    """Steps at which `fast` reaches the last value of `slow`, as a share of the steps of `slow`."""
    return steps_to(curve(slow, measure)[-1], fast["steps"], curve(fast, measure)) / slow["steps"][-1]


def early_ratio(fast: Mapping[str, Any], slow: Mapping[str, Any], measure: str) -> float:
    """Steps of `fast` to `MOST` of the last value of `slow`, as a share of the steps that `slow` itself takes."""
    threshold = MOST * curve(slow, measure)[-1]
    ours, theirs = (steps_to(threshold, arm["steps"], curve(arm, measure)) for arm in (fast, slow))
    return ours / theirs


def drawn_steps(results: Mapping[str, Any]) -> list[int]:
    """The steps at which every arm and seed drew."""
    return [step for step in results["steps"] if "drawing" in results["at"][step]]


def compare(arms: Mapping[str, list[dict[str, Any]]]) -> dict[str, Difference]:
    """Differences between the arms at the last step, by name."""
    found = {}
    pairs = [pair for pair in (("S", "P"), ("S", "P2"), ("P2", "P")) if set(pair) <= set(arms)]
    for first, second in pairs:
        for measure in MEASURES:
            values = [[r["at"][r["steps"][-1]][measure] for r in arms[arm]] for arm in (first, second)]
            found[f"{first} - {second}, {measure}"] = paired_bootstrap(*values)
    return found


def criterion(arms: Mapping[str, list[dict[str, Any]]], other: str = "P") -> dict[str, Any]:
    """Whether the criterion of docs/claims.md holds for S against another arm: "met", "not met" or "not testable"."""
    ratios = {
        measure: [step_ratio(s, p, measure) for s, p in zip(arms["S"], arms[other], strict=True)]
        for measure in ("gain", "matched")
    }
    drawn = drawn_steps(arms["S"][0])
    gaps = {
        step: float(np.mean([s["at"][step]["drawing"].mean() for s in arms["S"]]))
        - float(np.mean([p["at"][step]["drawing"].mean() for p in arms[other]]))
        for step in drawn
    }
    faster = {measure: all(ratio <= RATIO for ratio in values) for measure, values in ratios.items()}
    holds = all(faster.values()) and all(gap >= 0 for gap in gaps.values())
    early = {
        measure: [early_ratio(s, p, measure) for s, p in zip(arms["S"], arms[other], strict=True)] for measure in ratios
    }
    learned = all(curve(p, "matched")[-1] >= LEARNED for p in arms[other])
    verdict = "not testable" if not learned else "met" if holds else "not met"
    return {"step_ratios": ratios, "early_ratios": early, "faster": faster, "drawing_gaps": gaps, "verdict": verdict}


def summary(arm: str, results: list[dict[str, Any]]) -> list[Any]:
    """A row: medians over the seeds at the last step."""

    def middle(values: list[float]) -> float:
        return float(statistics.median(values))

    codes = [r["codes"] for r in results]
    cross_entropy = [curve(r, "cross_entropy")[-1] / r["codes"]["codes_per_image"] for r in results]
    last = [[r["at"][r["steps"][-1]][measure].mean() for r in results] for measure in MEASURES]
    return [
        arm,
        middle(cross_entropy),
        middle([relative(r)[-1] for r in results]),
        *map(middle, last),
        middle([r["reconstruction"].mean() for r in results]),
        middle([c["used"] for c in codes]),
        middle([math.exp(c["entropy"]) for c in codes]),
    ]


def report(output: pathlib.Path, seeds: Sequence[int], names: Sequence[str]) -> None:
    """Reads all results and writes tables, numbers and plots."""
    arms = {arm: [read(output / f"seed{seed}" / arm) for seed in seeds] for arm in names}
    head = ("arm", "cross-entropy per code", "relative to unigram", "gain, nats per image", "matching", "text to image")
    head += ("strict", "reconstruction", "codebook used", "perplexity")
    compared = compare(arms)
    verdicts = {arm: criterion(arms, arm) for arm in names if arm != "S"}
    rows: list[experiment.Row] = []
    for arm, found in verdicts.items():
        for measure, values in found["step_ratios"].items():
            rows.append((f"S : {arm}, {measure}", *values, "yes" if found["faster"][measure] else "no"))
        for measure, values in found["early_ratios"].items():
            rows.append((f"S : {arm}, {measure}, both to {MOST} of the value", *values, None))
    sections = {
        "Last step, medians of the seeds": experiment.table(head, [summary(arm, found) for arm, found in arms.items()]),
        "Steps of S to the other arm's last value, as a share of its steps": experiment.table(
            ("arms, measure", *(f"seed {seed}" for seed in seeds), f"at most {RATIO}"), rows
        ),
        "Differences at the last step": experiment.comparison_table(compared),
        "Criterion": "\n".join(
            f"- S against {arm}: {found['verdict']}; text to image, S - {arm} by step: "
            + ", ".join(f"{step}: {gap:+.3f}" for step, gap in found["drawing_gaps"].items())
            for arm, found in verdicts.items()
        ),
    }
    titles = dict(gain="Conditional gain, nats per image", matched="Caption matching, 16 captions")
    pictures = {
        name: plots.curves(title, "steps", {a: (r[0]["steps"], [curve(x, name) for x in r]) for a, r in arms.items()})
        for name, title in titles.items()
    }
    pictures["relative_cross_entropy"] = plots.curves(
        "Cross-entropy of codes / unigram entropy",
        "steps",
        {arm: (found[0]["steps"], [relative(x) for x in found]) for arm, found in arms.items()},
    )
    curves = {
        arm: [
            dict(steps=r["steps"], codes=r["codes"]) | {m: curve(r, m) for m in ("cross_entropy", *MEASURES[:2])}
            for r in f
        ]
        for arm, f in arms.items()
    }
    numbers = dict(seeds=seeds, curves=curves, comparisons=compared, criterion=verdicts)
    experiment.write(output, "Semantic image tokenizer (ILLUME, Fig. 6)", sections, numbers, pictures)


def main() -> None:
    """Entry point."""
    parser = experiment.parser(__doc__, "runs/semantic_tokenizer")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="S is always trained")
    flags = experiment.read_flags(parser)
    arms = [arm for arm in ARMS if arm in ("S", *flags.arms)]
    output = experiment.prepare(flags.output, "semantic_tokenizer", flags.quick)
    by_seed = {seed: commands(output / f"seed{seed}", seed, arms, flags.quick) for seed in flags.seeds}
    run_all(output, by_seed, flags.lanes)
    report(output, flags.seeds, arms)


if __name__ == "__main__":
    main()
