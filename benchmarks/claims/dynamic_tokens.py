"""LaVIT's claim that a dynamic number of image tokens is better than a fixed one (Table 3).

python -m benchmarks.claims.dynamic_tokens --output=runs/dynamic_tokens --seeds 0 1 2
python -m benchmarks.claims.dynamic_tokens --runs runs/quickstart runs/seed1 runs/seed2 --output=runs/dynamic_tokens

Arms at size `laptop`: dynamic, the config as it is; top_k, as many tokens for every image, the rounded mean of the
dynamic arm; more, one token more than that; random, patches chosen at random with the same mean number; all, all 16
patches with the steps of the language stages scaled so that the language model sees the same number of tokens. Encoder
and selector stage are shared, except that `all` trains merger and decoder without a selector. docs/claims.md has the
prediction and the criterion. With --runs, finished quickstarts are the dynamic arm, one run for each seed. An
interrupted run resumes.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.claims import experiment, plots, quickstart, scene_scores
from benchmarks.claims.stages import QUICK, Command, link, link_finished, overrides_of, run_all, steps_of
from unimm_jax.evals.bootstrap import Difference, paired_bootstrap

SIZE = quickstart.SIZE
ARMS = ("dynamic", "top_k", "more", "random", "all")
DEFAULT_ARMS = ("dynamic", "top_k", "all")
SHARED = ("encoder", "selector")  # stages of all arms but `all` and `random`, which have no selector of their own
LANGUAGE = ("stage1", "stage2", "stage3")
TOKENIZER = "model.image_tokenizer"
MEASURES = ("reconstruction", "drawing_strict", "questions")
CHOICE = ("selection", "top_k")  # settings of the image tokenizer in which the arms differ


def selection(arm: str, mean: float) -> dict[str, Any]:
    """Settings of the image tokenizer of an arm.

    Args:
      mean: tokens per image of the dynamic arm.
    """
    kept = max(round(mean), 1)
    chosen = {
        "dynamic": {},
        "top_k": dict(selection="top_k", top_k=kept),
        "more": dict(selection="top_k", top_k=kept + 1),
        "random": dict(selection="sample"),
        "all": dict(selection="all"),
    }[arm]
    return {f"{TOKENIZER}.{name}": value for name, value in chosen.items()}


def start_of_tokenizer(arm: str) -> dict[str, Any]:
    """The tokenizer stage's `init_from` where the selector stage had another selection."""
    if arm not in ("top_k", "more", "random"):
        return {}
    from unimm_jax import resolve

    (entry,) = resolve.load(f"tokenizer:{SIZE}").to_dict()["init_from"]
    return {"init_from": (entry | dict(allow=tuple(f"image_tokenizer.{name}" for name in CHOICE)),)}


def tokens_per_example(stage: str, records: pathlib.Path, settings: Mapping[str, Any], samples: int = 8) -> float:
    """Mean number of tokens of the examples of a language stage, over steps of the whole run."""
    from unimm_jax import resolve
    from unimm_jax.data import pipeline

    given = resolve.load(f"{stage}:{SIZE}")
    given.update_from_flattened_dict(dict(settings) | {"data.records": str(records)})
    config = resolve.parse(given)
    data: Any = pipeline.packed_input(config)
    steps = np.linspace(0, config.train.steps - 1, samples).astype(int).tolist()
    counts = [data.counts(step) for step in steps]
    return sum(c["tokens"] for c in counts) / sum(c["examples"] for c in counts)


def language_settings(arm: str, stage: str, root: pathlib.Path, mean: float, quick: bool) -> dict[str, Any]:
    """Settings of a language stage of an arm.

    All patches need longer rows. The steps of `all` are those of the dynamic arm times the ratio of the tokens per
    example.
    """
    settings = selection(arm, mean)
    if arm != "all":
        return settings
    settings |= {"data.seq_len": 128, "data.images_per_row": 5}
    small = overrides_of(stage, SIZE, QUICK) if quick else {}
    ours = tokens_per_example(stage, root / "dynamic" / "records", small)
    theirs = tokens_per_example(stage, root / "all" / "records", small | settings)
    return settings | {"train.steps": max(round(steps_of(stage, SIZE, quick) * ours / theirs), 1)}


def mean_tokens(root: pathlib.Path) -> float:
    """Tokens per image of the dynamic arm."""
    from unimm_jax.data.records import Records

    return float(Records(root / "dynamic" / "records").header["tokens"])


def arm_commands(arm: str, root: pathlib.Path, seed: int, quick: bool) -> list[Command]:
    """The commands of an arm. The settings are found when a stage starts, because they depend on the dynamic arm."""

    def settings_of(stage: str) -> Any:
        def settings() -> dict[str, Any]:
            mean = mean_tokens(root) if arm in ("top_k", "more", "random") else 0.0
            if stage in (*LANGUAGE, "text"):
                return language_settings(arm, stage, root, mean, quick) if stage != "text" else selection(arm, mean)
            return selection(arm, mean) | (start_of_tokenizer(arm) if stage == "tokenizer" else {})

        return settings

    names, folder, found = list(quickstart.STAGES[1:]), root / arm, []
    link(root / "encoder", folder / "encoder")
    if arm in ("dynamic", "top_k", "more"):
        names.remove("selector")
        link(root / "selector", folder / "selector")
    if arm == "random":
        names.remove("selector")
        flags = [f"--selector={root / 'selector'}", f"--records={root / 'dynamic' / 'records'}"]
        flags += [f"--output={folder / 'selector'}"]
        found.append(Command(folder / "selector", "benchmarks.claims.constant_selector", flags, 10))
    found += quickstart.commands(folder, seed, quick, names, {name: settings_of(name) for name in names})
    return [*found, scene_scores.command(folder / "scores", folder / "stage3", scene_scores.PARTS, quick)]


def use_quickstart(existing: pathlib.Path, root: pathlib.Path) -> None:
    """Links the stages of a finished quickstart as the dynamic arm and as the shared stages.

    Raises:
      SystemExit: `existing` lacks a stage.
    """
    for name in quickstart.STAGES:
        link_finished(existing, name, (root if name in SHARED else root / "dynamic") / name)


def commands(
    root: pathlib.Path, seed: int, arms: Sequence[str], quick: bool, existing: pathlib.Path | None = None
) -> list[Command]:
    """All commands of a seed, in order; the dynamic arm first.

    Args:
      existing: a finished quickstart that is the dynamic arm.
    """
    if existing is not None:
        use_quickstart(existing, root)
    found = quickstart.commands(root, seed, quick, SHARED)
    return [*found, *(command for arm in arms for command in arm_commands(arm, root, seed, quick))]


# ---- Results ---------------------------------------------------------------------------------------------------------


def compare(scores: Mapping[str, list[Mapping[str, np.ndarray]]]) -> dict[str, Difference]:
    """Differences of the dynamic arm from the others, by name."""
    return {
        f"dynamic - {arm}, {measure}": paired_bootstrap(
            [seed[measure] for seed in scores["dynamic"]], [seed[measure] for seed in scores[arm]]
        )
        for arm in scores
        if arm != "dynamic"
        for measure in MEASURES
    }


def judged(compared: Mapping[str, Difference], arm: str) -> str:
    """What the criterion of docs/claims.md says of the dynamic arm against another one."""
    found = {experiment.LABELS.get(m, m): compared[f"dynamic - {arm}, {m}"] for m in MEASURES}
    worse = [name for name, difference in found.items() if difference.high < 0]
    better = [name for name, difference in found.items() if difference.low > 0]
    if worse:
        return f"not met: the dynamic arm is worse on {'; '.join(worse)}"
    return f"met: better on {'; '.join(better)}" if better else "not met: no difference found"


def report(output: pathlib.Path, seeds: Sequence[int], arms: Sequence[str]) -> None:
    """Reads all results and writes tables and numbers."""
    from unimm_jax.evals.scenes import rank_correlation

    scores = {arm: [dict(np.load(output / f"seed{s}" / arm / "scores" / "scores.npz")) for s in seeds] for arm in arms}
    compared = compare(scores)
    measures = ("tokens", *MEASURES, "drawing", "reconstruction_random")
    means = {arm: [{name: float(s[name].mean()) for name in measures} for s in f] for arm, f in scores.items()}
    rows = [
        (arm, *(", ".join(f"{seed[name]:.3f}" for seed in found) for name in measures)) for arm, found in means.items()
    ]
    follow = [rank_correlation(s["tokens"], s["objects"].tolist()) for s in scores["dynamic"]]
    conclusions = {arm: judged(compared, arm) for arm in arms if arm != "dynamic"}
    head = ("arm", "tokens per image", "reconstruction", "text to image, strict", "questions", "text to image")
    sections = {
        "Scores of each seed": experiment.table((*head, "reconstruction, patches at random"), rows),
        "Tokens follow content": "Rank correlation of tokens and objects, dynamic arm: "
        + ", ".join(f"{x:.3f}" for x in follow),
        "Differences": experiment.comparison_table(compared),
        "Criterion": "\n".join(f"- against {arm}: {text}" for arm, text in conclusions.items()),
    }
    numbers = dict(seeds=seeds, scores=means, tokens_follow_objects=follow, comparisons=compared, criterion=conclusions)
    title = "Dynamic image tokens (LaVIT)"
    pictures = {"differences": plots.differences(title, compared)}
    experiment.write(output, title, sections, numbers, pictures)


def main() -> None:
    """Entry point."""
    parser = experiment.parser(__doc__, "runs/dynamic_tokens")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(DEFAULT_ARMS), help="dynamic is always trained")
    parser.add_argument("--runs", type=pathlib.Path, nargs="+", help="finished quickstarts, one for each seed")
    flags = experiment.read_flags(parser)
    existing = dict(zip(flags.seeds, flags.runs or (), strict=False))
    arms = [arm for arm in ARMS if arm in ("dynamic", *flags.arms)]
    output = experiment.prepare(flags.output, "dynamic_tokens", flags.quick)
    by_seed = {
        seed: commands(output / f"seed{seed}", seed, arms, flags.quick, existing.get(seed)) for seed in flags.seeds
    }
    run_all(output, by_seed, flags.lanes)
    report(output, flags.seeds, arms)


if __name__ == "__main__":
    main()
