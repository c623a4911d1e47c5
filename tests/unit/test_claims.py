"""The experiments of `benchmarks/claims`: statistics, what the arms differ in, scores whose values are known."""

import dataclasses
import json
import math
import pathlib
import sys
import xml.etree.ElementTree

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.claims import (
    assessment_documents,
    code_scores,
    constant_selector,
    dynamic_tokens,
    experiment,
    joint_training,
    plots,
    quickstart,
    scene_scores,
    self_assessment,
    semantic_tokenizer,
    stages,
    train_pixel_tokenizer,
)
from benchmarks.claims.thresholds import steps_to
from unimm_jax import objectives, resolve
from unimm_jax.evals.bootstrap import Difference, paired_bootstrap


@pytest.fixture
def pixel_objective(monkeypatch):
    """The objective of the pixel tokenizers, known for one test."""
    monkeypatch.setitem(
        objectives.REGISTRY, train_pixel_tokenizer.OBJECTIVE, "benchmarks.claims.pixel_tokenization:PixelTokenization"
    )


def config_of(flags):
    """The parsed config of a training command's flags."""
    (name,) = [flag.partition("=")[2] for flag in flags if flag.startswith("--config=")]
    given = resolve.load(name)
    for flag in flags:
        if flag.startswith("--config."):
            path, _, value = flag.removeprefix("--config.").partition("=")
            *parents, last = path.split(".")
            node = given
            for part in parents:
                node = node[part]
            old = node[last]
            node[last] = type(old)(value) if isinstance(old, int | float | str) else eval(value)
    return resolve.parse(given)


def arguments(command):
    return command.arguments() if callable(command.arguments) else command.arguments


def differing(a, b):
    """Names of the settings in which two configs differ."""

    def flat(value, name=""):
        if isinstance(value, dict):
            return {
                k: v for key, item in value.items() for k, v in flat(item, f"{name}.{key}" if name else key).items()
            }
        return {name: value}

    first, second = (flat(json.loads(config.to_json())) for config in (a, b))
    return {name for name in first.keys() | second.keys() if first.get(name) != second.get(name)}


# ---- Statistics ------------------------------------------------------------------------------------------------------


def test_the_bootstrap_of_a_constant_difference_is_a_point():
    b = [np.random.default_rng(i).random(40) for i in range(3)]
    found = paired_bootstrap([x + 0.25 for x in b], b)
    assert found.mean == pytest.approx(0.25) and found.low == pytest.approx(0.25) and found.high == pytest.approx(0.25)
    assert found.verdict == "higher" and found.per_seed == pytest.approx((0.25, 0.25, 0.25))


def test_the_interval_of_one_seed_is_that_of_the_mean():
    """With one seed and independent examples, the 95% interval is the mean ± 1.96 standard errors."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.3, 1, 500), rng.normal(0, 1, 500)
    found, error = paired_bootstrap([a], [b]), (a - b).std() / math.sqrt(500)
    assert found.low == pytest.approx(found.mean - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(found.mean + 1.96 * error, abs=0.15 * error)


def test_seeds_that_disagree_widen_the_interval():
    """Without noise in the examples, the bounds are the means of resampled seeds: here the extremes."""
    found = paired_bootstrap([np.full(50, x) for x in (-0.1, 0.1, 0.3)], [np.zeros(50)] * 3)
    assert found.mean == pytest.approx(0.1)
    assert (found.low, found.high) == pytest.approx((-0.1, 0.3)) and found.verdict == "no difference found"


def test_pairing_removes_what_both_arms_share():
    hard = np.random.default_rng(0).random(100) * 10
    found = paired_bootstrap([hard + 0.01] * 2, [hard] * 2)
    assert found.is_above_zero and found.high - found.low < 1e-6


def test_seeds_are_not_independent_measurements_of_an_example():
    """Every seed has the same effect of each example; the interval was once narrower by the root of the seeds."""
    effect = np.random.default_rng(0).normal(0.2, 1, 400)
    one, three = (paired_bootstrap([effect] * seeds, [np.zeros(400)] * seeds) for seeds in (1, 3))
    assert three.high - three.low == pytest.approx(one.high - one.low, rel=0.05)
    unequal = paired_bootstrap([effect, effect[:300]], [np.zeros(400), np.zeros(300)])
    assert unequal.low < unequal.mean < unequal.high


def test_arms_without_pairs_are_refused():
    with pytest.raises(ValueError, match="same examples"):
        paired_bootstrap([np.zeros(3)], [np.zeros(4)])
    with pytest.raises(ValueError, match="same seeds"):
        paired_bootstrap([np.zeros(3)], [np.zeros(3), np.zeros(3)])


def test_steps_to_a_threshold_are_interpolated():
    steps, values = [100, 200, 400], [0.0, 1.0, 2.0]
    assert steps_to(0.5, steps, values) == 150
    assert steps_to(1.5, steps, values) == 300
    assert steps_to(2.0, steps, values) == 400
    assert steps_to(-1.0, steps, values) == 100  # reached before the first point: an upper bound
    assert steps_to(2.1, steps, values) == math.inf
    assert steps_to(0.8, [0, 1, 2, 3], [0, 1, 0, 1]) == pytest.approx(0.8)  # the first time


# ---- Gain and matching -----------------------------------------------------------------------------------------------


def test_gain_and_matching_of_known_cross_entropies():
    losses = np.array([[1.0, 5.0], [2.0, 3.0], [4.0, 4.0], [9.0, 2.0]])  # images 1 and 2 prefer no caption of their own
    found = code_scores.scores_of(losses, np.full(4, 4.5), np.full(4, 7.0))
    assert found.cross_entropy.tolist() == [1.0, 3.0, 4.0, 2.0] and found.gain.tolist() == [3.5, 1.5, 0.5, 2.5]
    assert found.matched.tolist() == [True, False, False, True]  # a tie is no match
    # a model that has not learned the unconditional prompt: the unigram distribution, or the other captions
    assert code_scores.scores_of(losses, np.full(4, 90.0), np.full(4, 4.0)).gain.tolist() == [3.0, 1.0, 0.0, 2.0]
    found = code_scores.scores_of(losses, np.full(4, 90.0), np.full(4, 70.0))
    np.testing.assert_allclose(found.gain, [4.0, -1.0, 0.0, 7.0])  # with groups of two: the other caption


def test_a_model_that_ignores_captions_has_no_gain():
    losses = np.repeat(np.random.default_rng(0).uniform(20, 40, (32, 1)), 16, axis=1)
    found = code_scores.scores_of(losses, np.full(32, 90.0), np.full(32, 50.0))
    np.testing.assert_allclose(found.gain, 0, atol=1e-9)
    assert not found.matched.any()


def test_a_model_that_knows_one_of_sixteen_gains_what_the_caption_tells():
    """Given its caption, an image is certain; without it, 1 of 64: the gain is log(64), not that of a group."""
    losses = np.full((16, 16), 99.0)
    np.fill_diagonal(losses, 0.0)
    found = code_scores.scores_of(losses, np.full(16, math.log(64)), np.full(16, 9.0))
    np.testing.assert_allclose(found.gain, math.log(64))
    assert found.matched.all()


def test_unigram_entropy_and_use():
    entropy, used = code_scores.unigram(np.array([[0, 1], [2, 3]]), 8)
    assert entropy == pytest.approx(math.log(4)) and used == 0.5
    assert code_scores.unigram(np.zeros(5, int), 8) == (0.0, 0.125)


def test_captions_of_a_group_differ():
    captions = ["a", "a", "b", "c", "b", "d"]
    assert code_scores.groups(captions, 2, 2).tolist() == [[0, 2], [1, 3]]
    with pytest.raises(ValueError, match="different ones"):
        code_scores.groups(["a", "a", "a", "b"], 2, 2)


def test_the_scorer_sees_what_a_model_knows(tmp_path):
    """Rows of records, and a "model" with uniform probabilities, except for sequences that it knows by heart."""
    from unimm_jax.data.records import Records
    from unimm_jax.inference.loading import Model
    from unimm_jax.sharding import make_mesh

    helpers.write_random_records(tmp_path)
    helpers.write_random_records(tmp_path / "test")
    records = Records(tmp_path)
    codes, first_code = records.header["codes"], records.text_tokenizer.num_rows + 2

    class Memory:
        """Cross-entropy log(codes) for every code, and 0 in the sequences `params` [M, T] and for everything else."""

        def cross_entropy(self, params, batch):
            is_code = (batch["targets"] >= first_code) & (batch["targets"] < first_code + codes)
            is_known = (batch["tokens"][:, None] == params).all(-1).any(-1)
            return jnp.where(is_code & ~is_known[:, None], jnp.log(float(codes)), 0.0)

    config, mesh = helpers.tiny("stage2", data__records=str(tmp_path)), make_mesh((1, 1, 1))
    model = Model(config, Memory(), None, mesh, records.header, records.text_tokenizer, tmp_path)
    scorer = code_scores.CodeScorer(model, tmp_path, 32)
    kept = np.array([records[i].keep[0].sum() for i in scorer.groups.ravel()])
    assert ((scorer.free["weights"] > 0).sum(-1) == 2 * kept).all()  # a position and a code for each patch, no [/IMG]
    own = np.arange(32) * code_scores.GROUP + np.arange(32) % code_scores.GROUP
    nothing, known = scorer.score(jnp.zeros((1, 1), int)), scorer.score(jnp.asarray(scorer.rows["tokens"][own]))
    np.testing.assert_allclose(nothing.cross_entropy, kept * math.log(codes), rtol=1e-5)
    assert abs(nothing.gain.mean()) < 0.05 * kept.mean()  # the unigram distribution of random codes is almost uniform
    assert not nothing.matched.any() and known.matched.all()
    assert (known.cross_entropy == 0).all()
    assert known.gain.mean() == pytest.approx(scorer.entropy * kept.mean(), rel=0.05)
    assert scorer.codes_per_image == kept.mean() and 0.9 < scorer.used <= 1


# ---- Arms ------------------------------------------------------------------------------------------------------------


def test_the_arms_of_the_semantic_tokenizer_differ_in_the_codes_only(tmp_path, pixel_objective):
    found = {
        c.folder.relative_to(tmp_path).as_posix(): c
        for c in semantic_tokenizer.commands(tmp_path, 7, semantic_tokenizer.ARMS, False)
    }
    ordinary = config_of(arguments(found["S/tokenizer"]))
    assert (
        differing(ordinary, dataclasses.replace(resolve.parse(resolve.load("tokenizer:laptop-illume")), seed=7))
        == set()
    )
    loss = {"objective", "model.pixel_decoder"} | {
        f"model.pixel_decoder.{x}" for x in ("width", "depth", "heads", "mlp_width")
    }
    pixel = {arm: config_of(arguments(found[f"{arm}/pixel_tokenizer"])) for arm in ("P", "P2")}
    assert differing(ordinary, pixel["P2"]) <= loss | {"init_from"}
    assert differing(pixel["P2"], pixel["P"]) == {"optimizer.rules"}
    encoder = config_of(arguments(found["encoder"]))
    for arm in ("P", "P2"):
        start = config_of(arguments(found[f"{arm}/pixel_start"]))
        assert differing(pixel[arm], start) == {"init_from", "loss.phase", "train.steps"}
        assert start.init_from == (() if arm == "P" else ordinary.init_from)
        assert start.train.steps == encoder.train.steps and start.train.batch_size == encoder.train.batch_size
    for stage in ("pixel_decoder", "stage1", "stage2"):
        configs = [config_of(arguments(found[f"{arm}/{stage}"])) for arm in semantic_tokenizer.ARMS]
        assert all(differing(configs[0], other) == set() for other in configs[1:]), stage
    (encoder, text) = config_of(arguments(found["P/stage1"])).init_from
    assert (tmp_path / "P" / "stage1" / encoder["checkpoint"]).resolve() == tmp_path / "encoder"
    assert (tmp_path / "P" / "stage1" / text["checkpoint"]).resolve() == tmp_path / "text"
    saved = config_of(arguments(found["S/stage2"]))
    assert saved.train.checkpoint_every * semantic_tokenizer.POINTS == saved.train.steps
    assert saved.train.keep == semantic_tokenizer.POINTS
    assert found["P/records"].arguments[-1] == f"--text_tokenizer={tmp_path / 'text'}"


@pytest.mark.slow
def test_a_pixel_tokenizer_trains_its_encoder_and_becomes_an_image_tokenizer(tmp_path, pixel_objective):
    from benchmarks.claims.extract_image_tokenizer import extract
    from unimm_jax.checkpoint import read_params
    from unimm_jax.inference.loading import load_image_tokenizer
    from unimm_jax.train import train

    metrics = {}
    for kind, workdir in (("P_start", "pixel_start"), ("P", "pixel")):
        given = resolve.load(f"{semantic_tokenizer.PIXEL_CONFIG}:{kind}")
        small = stages.overrides_of("tokenizer", "laptop-illume", stages.QUICK) | {"train.steps": 12}
        given.update_from_flattened_dict(small)
        metrics[kind] = train(resolve.parse(given), tmp_path / workdir)
    assert metrics["P_start"].keys() >= {"pixel_mse"} and "perplexity" not in metrics["P_start"]
    assert metrics["P"]["pixel_mse"] < 0.1 and 0 < metrics["P"]["codebook_usage"] <= 1
    before, after = (read_params(tmp_path / name)["encoder"] for name in ("pixel_start", "pixel"))
    assert any(
        (np.asarray(a) != np.asarray(b)).any() for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True)
    )
    extract(tmp_path / "pixel", tmp_path / "tokenizer")
    tokenizer, whole = load_image_tokenizer(tmp_path / "tokenizer"), read_params(tmp_path / "pixel")
    assert set(tokenizer.params) == set(whole) - {"pixel_decoder"}
    assert tokenizer.config.objective == "tokenization" and (tmp_path / "tokenizer" / "done.json").exists()
    rows = np.abs(np.asarray(tokenizer.params["quantizer"]["codebook"])).sum()
    assert rows == np.abs(np.asarray(whole["quantizer"]["codebook"])).sum()


def test_specialists_see_as_many_examples_as_the_joint_model():
    config = resolve.parse(resolve.load("stage3:laptop"))
    examples = joint_training.examples_by_task(config, 12_000)
    assert sum(examples.values()) == pytest.approx(config.train.steps * config.train.batch_size)
    assert 0.6 < examples["question"] / sum(examples.values()) < 0.8
    steps = {}
    for kind, tasks in joint_training.TASKS.items():
        settings = joint_training.specialist_settings(kind, config, 12_000, equal_steps=False)
        given = resolve.load("stage3:laptop")
        given.update_from_flattened_dict(settings)
        specialist = resolve.parse(given)
        others = {task for names in joint_training.TASKS.values() for task in names if task not in tasks}
        changed = {f"data.{when}.{task}" for when in ("tasks", "tasks_end") for task in others}
        assert differing(config, specialist) == changed | {"train.steps"}
        own = joint_training.examples_by_task(specialist, 12_000)
        assert not any(own[task] for task in others)
        wanted = sum(examples[task] for task in tasks)
        assert sum(own.values()) == pytest.approx(wanted, abs=config.train.batch_size)
        steps[kind] = specialist.train.steps
        same = joint_training.specialist_settings(kind, config, 12_000, equal_steps=True)
        assert "train.steps" not in same
    assert sum(steps.values()) == pytest.approx(config.train.steps, abs=1)


def test_a_finished_quickstart_is_used(tmp_path):
    for name in (*joint_training.NEEDED, "stage3"):
        (tmp_path / "run" / name).mkdir(parents=True)
        (tmp_path / "run" / name / "done.json").write_text("{}")
    found = joint_training.commands(tmp_path / "out", 0, joint_training.ARMS, False, tmp_path / "run")
    assert [c.folder.name for c in found if c.is_done] == ["stage3_joint"]
    (tmp_path / "run" / "stage2" / "done.json").unlink()
    with pytest.raises(SystemExit, match="no finished stage2"):
        joint_training.commands(tmp_path / "other", 0, joint_training.ARMS, False, tmp_path / "run")


def test_the_arms_of_dynamic_tokens_differ_in_the_selection(tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_tokens, "mean_tokens", lambda root: 2.29)
    per_example = {"dynamic": 20.0, "all": 30.0}
    monkeypatch.setattr(
        dynamic_tokens, "tokens_per_example", lambda stage, records, settings: per_example[records.parent.name]
    )
    found = {
        c.folder.relative_to(tmp_path).as_posix(): c
        for c in dynamic_tokens.commands(tmp_path, 0, dynamic_tokens.ARMS, False)
    }
    choice = {"model.image_tokenizer.selection", "model.image_tokenizer.top_k"}
    for stage in ("tokenizer", "pixel_decoder", *dynamic_tokens.LANGUAGE):
        configs = {arm: config_of(arguments(found[f"{arm}/{stage}"])) for arm in dynamic_tokens.ARMS}
        starts = {"init_from"} if stage == "tokenizer" else set()
        assert differing(configs["dynamic"], configs["top_k"]) == choice | starts
        assert differing(configs["dynamic"], configs["random"]) == (choice - {"model.image_tokenizer.top_k"}) | starts
        assert [configs[arm].model["image_tokenizer"].top_k for arm in ("top_k", "more")] == [2, 3]
        rows = {"data.seq_len", "data.images_per_row", "train.steps"} if stage in dynamic_tokens.LANGUAGE else set()
        assert differing(configs["dynamic"], configs["all"]) - rows == {"model.image_tokenizer.selection"}
        if rows:
            assert configs["all"].train.steps == round(configs["dynamic"].train.steps * 2 / 3)
    assert "dynamic/selector" not in found and "all/selector" in found
    assert found["random/selector"].module == "benchmarks.claims.constant_selector"


def test_a_finished_quickstart_is_the_dynamic_arm(tmp_path):
    for name in quickstart.STAGES:
        (tmp_path / "run" / name).mkdir(parents=True)
        (tmp_path / "run" / name / "done.json").write_text("{}")
    arms = ("dynamic", "top_k", "all")
    found = dynamic_tokens.commands(tmp_path / "out", 0, arms, False, tmp_path / "run")
    open_commands = [c.folder.relative_to(tmp_path / "out").as_posix() for c in found if not c.is_done]
    assert open_commands[:2] == ["dynamic/scores", "top_k/tokenizer"] and "all/selector" in open_commands
    assert (tmp_path / "out" / "dynamic" / "stage3").resolve() == tmp_path / "run" / "stage3"
    (tmp_path / "run" / "text" / "done.json").unlink()
    with pytest.raises(SystemExit, match="no finished text"):
        dynamic_tokens.commands(tmp_path / "other", 0, arms, False, tmp_path / "run")


def test_the_arms_of_self_assessment_differ_in_their_documents(tmp_path):
    arms, root = self_assessment.ARMS, tmp_path / "seed0"
    commands = self_assessment.arm_commands(root, 0, arms, tmp_path / "seed1", False)
    found = {c.folder.relative_to(root).as_posix(): c for c in commands}
    configs = {arm: config_of(arguments(found[f"stage3_{arm}"])) for arm in arms}
    assert differing(configs["own"], configs["extra"]) == {"data.mixture"}
    for arm in ("shuffled", "other", "no_correction"):
        assert differing(configs["own"], configs[arm]) == {"data.records"}
        assert configs[arm].data.records == f"../records_{arm}"
        (sources,) = [flag for flag in arguments(found[f"records_{arm}"]) if flag.startswith("--sources=")]
        assert sources == f"--sources=scenes;chat:{root}/documents_{arm}/documents.jsonl"
    (start,) = configs["own"].init_from
    assert (root / "stage3_own" / start["checkpoint"]).resolve() == root / "stage3"
    assert [entry["weight"] for entry in configs["own"].data.mixture] == [0.9, 0.1]
    stage3 = dataclasses.replace(resolve.parse(resolve.load("stage3:laptop")), seed=0)
    changed = {"init_from", "train.steps", "data.records", "data.mixture", "data.seq_len", "data.images_per_row"}
    changed |= {f"data.tasks.{task}" for task in ("question", "text_to_image")}
    changed |= {f"optimizer.{name}" for name in ("learning_rate", "muon_learning_rate", "warmup")}
    assert differing(stage3, configs["own"]) == changed
    assert all(value == configs["own"].data.tasks_end[task] for task, value in configs["own"].data.tasks.items())
    own, other = (arguments(found[name]) for name in ("drawings", "drawings_other"))
    assert {x for x in own if x not in other} == {f"--checkpoint={root}/stage3", f"--output={root}/drawings"}
    assert f"--checkpoint={tmp_path}/seed1/stage3" in other  # the captions are those of this seed
    assert self_assessment.partners([3, 5, 7]) == {3: 5, 5: 7, 7: 3} and self_assessment.partners([3]) == {}


def test_a_finished_quickstart_is_used_for_self_assessment(tmp_path):
    for name in self_assessment.NEEDED:
        (tmp_path / "run" / name).mkdir(parents=True)
        (tmp_path / "run" / name / "done.json").write_text("{}")
    assert self_assessment.base_commands(tmp_path / "out", 0, False, tmp_path / "run") == []
    assert (tmp_path / "out" / "stage3").resolve() == tmp_path / "run" / "stage3"
    (tmp_path / "run" / "stage3" / "done.json").unlink()
    with pytest.raises(SystemExit, match="no finished stage3"):
        self_assessment.base_commands(tmp_path / "other", 0, False, tmp_path / "run")


@pytest.fixture
def assessed(tmp_path, monkeypatch):
    """Documents on 30 drawings, half of them good: (directory, drawings, records)."""
    from unimm_jax.data.records import Records
    from unimm_jax.enhancement.assessing import assess
    from unimm_jax.enhancement.building import build

    found, stored = helpers.write_drawings(tmp_path / "drawings", 30)
    monkeypatch.setattr(Records, "open", lambda path: stored)
    assess(str(found.path), "scenes")
    build(str(found.path), "records", str(tmp_path / "own"))
    return tmp_path / "own", found, stored


def test_shuffling_permutes_the_verdicts_only(assessed, tmp_path):
    from unimm_jax.data.sources import open_source
    from unimm_jax.enhancement.verdicts import CORRECTION, from_text

    documents, drawings, stored = assessed
    for place in ("a", "b"):
        assessment_documents.transform("shuffled", documents, drawings.path, tmp_path, tmp_path / place, 5)
    before, after, again = (assessment_documents.read(x) for x in (documents, tmp_path / "a", tmp_path / "b"))
    assert after == again  # a function of the arguments
    texts = [[assessment_documents.verdict_of(row) for row in rows] for rows in (before, after)]
    assert texts[0] != texts[1] and sorted(texts[0]) == sorted(texts[1])
    counts = assessment_documents.count(after)
    assert counts == assessment_documents.count(before)
    assert counts["corrections"] == counts["documents"] - counts["good"] > 5 and counts["good"] > 5
    record_of = {item.index: item.record for block in drawings.complete() for item in drawings.block(block)}
    source, changed = open_source(f"chat:{tmp_path}/a/documents.jsonl", held_out=0.0), 0
    for i, (old, new) in enumerate(zip(before, after, strict=True)):
        assert new["messages"][0] == old["messages"][0]  # image and question
        assert (new["drawing"], new["key"]) == (old["drawing"], old["key"])
        image = new["messages"][0]["content"][0]["image"]
        assert (tmp_path / "a" / image).read_bytes() == (documents / image).read_bytes()
        if from_text(assessment_documents.verdict_of(new)).good:
            assert len(new["messages"]) == 2 and len(source[i].images) == 1
            continue
        assert new["messages"][2]["content"] == [{"type": "text", "text": CORRECTION}]
        assert source[i].images[1] == stored[record_of[new["drawing"]]].images[0]  # of its own caption
        changed += len(old["messages"]) == 2
    assert changed > 0  # a good image got the verdict of a bad one, and a correction


def test_no_row_keeps_its_own_verdict():
    rows = [
        {
            "messages": [
                {},
                {"content": [{"text": f"{i} circles. object yes, count yes, color yes, spatial yes, overall yes"}]},
            ],
            "drawing": i,
        }
        for i in range(9)
    ]
    for seed in range(20):
        found = assessment_documents.shuffled(rows, seed, lambda row: "")
        assert not any(
            assessment_documents.verdict_of(a) == assessment_documents.verdict_of(b)
            for a, b in zip(rows, found, strict=True)
        )
    rows[3]["messages"][1]["content"][0]["text"] = "no verdict"
    with pytest.raises(ValueError, match="drawing 3 has an unreadable verdict"):
        assessment_documents.shuffled(rows, 0, lambda row: "")


def test_without_corrections_the_rest_stays(assessed, tmp_path):
    documents, drawings, _ = assessed
    assessment_documents.transform("no_correction", documents, drawings.path, tmp_path, tmp_path / "out", 0)
    before, after = assessment_documents.read(documents), assessment_documents.read(tmp_path / "out")
    assert after == [row | {"messages": row["messages"][:2]} for row in before]
    counts = assessment_documents.count(after)
    assert counts == assessment_documents.count(before) | {"corrections": 0}


def test_a_constant_selector_keeps_patches_at_random():
    from flax import nnx

    from unimm_jax.models.keys import Keys
    from unimm_jax.models.tokenizer.selector import KEEP, Selector

    selector = Selector(16, rngs=Keys(params=0))
    params = {"selector": nnx.to_pure_dict(nnx.state(selector, nnx.Param))}
    changed = constant_selector.constant(params, 0.2)["selector"]
    nnx.update(selector, nnx.state(nnx.merge(nnx.graphdef(selector), changed)))
    probs = jnp.exp(selector(jnp.asarray(np.random.default_rng(0).normal(size=(2, 9, 16)), jnp.float32)))[..., KEEP]
    np.testing.assert_allclose(np.asarray(probs), 0.2, rtol=1e-5)


# ---- Verdicts, reports and running -----------------------------------------------------------------------------------


def curve(steps, gain, matched, drawing):
    at = {
        step: dict(gain=np.full(4, g), matched=np.full(4, m), drawing=np.full(6, drawing), drawing_strict=np.zeros(6))
        | dict(cross_entropy=np.full(4, 32.0))
        for step, g, m in zip(steps, gain, matched, strict=True)
    }
    codes = dict(entropy=4.0, used=1.0, codes_per_image=16.0)
    return dict(steps=steps, at=at, codes=codes, reconstruction=np.ones(3))


def test_the_criterion_of_the_semantic_tokenizer():
    fast = curve([100, 200, 400], [2.0, 4.0, 5.0], [0.5, 0.9, 1.0], 0.6)
    slow = curve([100, 200, 400], [0.0, 1.0, 3.0], [0.1, 0.4, 0.7], 0.5)
    found = semantic_tokenizer.criterion({"S": [fast], "P": [slow]})
    assert found["early_ratios"]["gain"] == [pytest.approx(135 / 370)]
    assert found["step_ratios"] == {"gain": [150 / 400], "matched": [150 / 400]} and found["verdict"] == "met"
    assert semantic_tokenizer.relative(fast) == [0.5, 0.5, 0.5]
    reversed_arms = semantic_tokenizer.criterion({"S": [slow], "P": [fast]})
    assert reversed_arms["verdict"] == "not met" and reversed_arms["step_ratios"]["gain"] == [math.inf]
    nothing = curve([100, 200, 400], [0.0, 0.0, 0.0], [0.06, 0.07, 0.1], 0.0)  # reached at once, which shows nothing
    assert semantic_tokenizer.criterion({"S": [fast], "P": [nothing]})["verdict"] == "not testable"


@pytest.mark.parametrize(
    "low, high, text",
    [(0.01, 0.1, "helps"), (-0.04, 0.1, "neutral"), (-0.2, -0.06, "costs"), (-0.1, 0.02, "undecided")],
)
def test_the_criterion_of_joint_training(low, high, text):
    assert text in joint_training.judged(Difference((low + high) / 2, low, high, (0.0,), 0.5, 0.5))


def test_the_criterion_of_dynamic_tokens():
    def compared(*bounds):
        found = zip(dynamic_tokens.MEASURES, bounds, strict=True)
        return {f"dynamic - all, {m}": Difference(sum(b) / 2, *b, (0.0,), 0.5, 0.5) for m, b in found}

    null, up, down = (-0.1, 0.1), (0.1, 0.2), (-0.2, -0.1)
    assert dynamic_tokens.judged(compared(null, up, null), "all") == "met: better on text to image, strict"
    assert dynamic_tokens.judged(compared(null, null, null), "all") == "not met: no difference found"
    assert "worse on questions" in dynamic_tokens.judged(compared(up, up, down), "all")


def test_the_criterion_of_self_assessment():
    up, null = np.ones(40), np.tile([1.0, 0.0], 20)

    def scores(**arms):
        return {arm: [dict.fromkeys(self_assessment.MEASURES, values)] * 3 for arm, values in arms.items()}

    low = np.zeros(40)
    found = self_assessment.compare(scores(base=low, own=up, extra=low, shuffled=low, other=up, no_correction=low))
    assert len(found) == 4 * 3 and not any("base" in name for name in found)
    assert self_assessment.judged(found).startswith("met")
    found = self_assessment.compare(scores(own=null, extra=null, shuffled=low))
    text = self_assessment.judged(found)
    assert text.startswith("not met: own - extra, questions: no difference found") and "shuffled" not in text


def test_a_side_without_images_has_no_agreement():
    found = dict(assessment_agreement=0.5, assessment_agreement_by_side={"wrong": 0.5}, assessment_unparsed=0.25)
    assert self_assessment.agreement_row("own", [found] * 2) == (
        "own",
        "0.500, 0.500",
        "-, -",
        "0.500, 0.500",
        "0.250, 0.250",
    )


def test_results_are_written_as_table_json_and_svg(tmp_path):
    found = paired_bootstrap([np.ones(4)], [np.zeros(4)])
    svg = plots.curves("A & B", "steps", {"S": ([1, 2], [[0.0, 1.0], [0.5, 1.5]]), "P": ([1, 2], [[0, 0], [0, 0]])})
    sections = {"Part": experiment.comparison_table({"x - y": found})}
    experiment.write(tmp_path, "Title", sections, dict(a=found, never=[math.inf]), {"gain": svg})
    assert (
        "| x - y | 1.000 | 0.000 | +1.000 [+1.000, +1.000] | +1.000 | higher |" in (tmp_path / "results.md").read_text()
    )
    numbers = json.loads((tmp_path / "results.json").read_text())
    assert numbers["a"]["mean"] == 1 and numbers["never"] == ["never"]
    assert svg.count("<polyline") == 2 and "A &amp; B" in (tmp_path / "gain.svg").read_text()


def test_differences_are_drawn_with_their_intervals_and_seeds():
    found = {"a - b, <x>": Difference(0.2, 0.1, 0.3, (0.15, 0.25), 0.5, 0.3)}
    found["a - c, x"] = Difference(-0.1, -0.4, 0.0, (-0.1,), 0.5, 0.6)
    assert set(experiment.labeled({"a - b, drawing_strict": found["a - b, <x>"]})) == {"a - b, text to image, strict"}
    svg = plots.differences("A & B", found)
    root = xml.etree.ElementTree.fromstring(svg)
    marks = [root.findall(f".//{{*}}{name}") for name in ("circle", "rect", "path")]
    assert [len(each) for each in marks] == [3, 2, 3]  # a line at 0 and an interval each
    left, right = (float(marks[1][i].get("x")) for i in (1, 0))
    assert left < float(marks[2][0].get("d")[1:].split()[0]) < right  # the means are on both sides of 0
    assert "a - b, &lt;x&gt;" in svg and plots.differences("none", {}).startswith("<svg")


def test_commands_run_once_and_failures_name_their_log(tmp_path, capsys):
    (tmp_path / "write.py").write_text(
        "import pathlib, sys\nfolder = pathlib.Path(sys.argv[1])\nfolder.mkdir()\n"
        "(folder / 'done.json').write_text('{}')\nprint('written')\n"
    )
    sys_path = [str(tmp_path)]
    command = stages.Command(tmp_path / "a", "write", [str(tmp_path / "a")], 1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", sys_path[0])
        stages.run_all(tmp_path, {0: [command]}, lanes=2)
        assert (tmp_path / "a.log").read_text() == "written\n"
        stages.run_all(tmp_path, {0: [command]})
        again = stages.Command(tmp_path / "b", "write", [str(tmp_path / "a")], 1.0)  # the folder is there: it fails
        with pytest.raises(SystemExit, match=r"failed with status 1; its output is in .*b\.log"):
            stages.run_all(tmp_path, {0: [again]})
        other = stages.Command(tmp_path / "c", "write", [str(tmp_path / "c")], 1.0)
        with pytest.raises(SystemExit, match="failed with status 1"):
            stages.run_all(tmp_path, {0: [again], 1: [other]})
        assert not other.is_done  # nothing is started after a failure
    assert "[1/1] a:" in capsys.readouterr().out


def test_stages_of_other_runs_are_not_taken(tmp_path):
    for name in ("one", "two", "place"):
        (tmp_path / name).mkdir()
    for _ in range(2):
        stages.link(tmp_path / "one", tmp_path / "linked")
    for place in ("linked", "place"):
        with pytest.raises(SystemExit, match="an earlier call had other --runs; give another --output"):
            stages.link(tmp_path / "two", tmp_path / place)


@pytest.mark.parametrize(
    ("given", "problem"),
    [(["--seeds", "0", "0"], "--seeds must differ"), (["--runs", "a"], "--runs has 1 directories for 3 seeds")],
)
def test_flags_that_do_not_fit_are_refused(given, problem, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dynamic_tokens", *given])
    with pytest.raises(SystemExit):
        dynamic_tokens.main()
    assert problem in capsys.readouterr().err


def test_other_settings_need_another_output(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    experiment.prepare(tmp_path / "out", "name", False)
    with pytest.raises(SystemExit, match="other settings"):
        experiment.prepare(tmp_path / "out", "name", True)


@pytest.mark.slow
def test_results_of_single_examples_are_paired_and_complete(run, tmp_path):
    """The tiny stage 3: the results of single questions and scenes have the means that the benchmark reports."""
    from unimm_jax.evals import scenes as evaluator
    from unimm_jax.inference.generator import Generator
    from unimm_jax.inference.loading import load_model

    sizes = dict(drawing=1, questions=4, reconstruction=8)
    scene_scores.measure(run / "stage3", tmp_path, scene_scores.PARTS, sizes)
    found = np.load(tmp_path / "scores.npz")
    assert found["drawing"].shape == (6,) and found["questions"].shape == (20,) and found["tokens"].shape == (8,)
    generator = Generator(load_model(run / "stage3"), 64)
    assert found["questions"].mean() == pytest.approx(
        evaluator.score_questions(generator, 4, 1.0).scores["questions"]["overall"]
    )
    test = evaluator.draw_test_scenes(generator, 8, 1.0)
    assert (found["tokens"] == test.keep.sum(-1)).all()


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("experiment_module", [semantic_tokenizer, joint_training, dynamic_tokens, self_assessment])
def test_an_experiment_runs_from_start_to_end(experiment_module, tmp_path, monkeypatch):
    """Minutes: every stage is a process."""
    monkeypatch.setattr(sys, "argv", ["x", f"--output={tmp_path}", "--quick", "--seeds", "0"])
    experiment_module.main()
    assert (tmp_path / "results.md").exists() and json.loads((tmp_path / "results.json").read_text())["seeds"] == [0]
    began = {f: f.stat().st_mtime for f in pathlib.Path(tmp_path).rglob("done.json")}
    experiment_module.main()  # nothing runs again
    assert began == {f: f.stat().st_mtime for f in pathlib.Path(tmp_path).rglob("done.json")}
