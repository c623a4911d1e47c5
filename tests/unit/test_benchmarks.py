"""Benchmarks at tiny sizes with the settings of a GPU (bfloat16, MFU): both sides run and do the same work."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import (
    against_commit,
    aids,
    dynamic_tokens,
    generation,
    lm_step,
    seeds,
    stage2_step,
    timing,
    tokenizer_forward,
    vit,
)
from unimm_jax import resolve
from unimm_jax.models.language import LanguageConfig
from unimm_jax.models.tokenizer import ImageTokenizerConfig
from unimm_jax.models.vit import ViTConfig

TINY = LanguageConfig(width=64, layers=2, heads=4, kv_heads=2, head_width=16, mlp_width=128)
CASE = lm_step.Case(TINY, 384, 2, 64, "bfloat16")
SIZES = dynamic_tokens.Sizes(
    dict(width=32, depth=1, heads=2, mlp_width=64),
    dict(heads=2, mlp_width=64, merger_depth=1),
    {f.name: getattr(TINY, f.name) for f in dataclasses.fields(TINY)},
    *("bfloat16", 1),
)


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    """torch.compile takes half a minute a model."""
    monkeypatch.setattr(torch, "compile", lambda model: model)


def test_the_language_models_do_the_same_work(capsys):
    found = lm_step.main(CASE, peak=1e12, rounds=1)
    assert found.keys() == {"ours", "transformers, eager", "transformers, compiled"}
    shown = capsys.readouterr().out
    share = 100 * CASE.flops / found["ours"] / 1e12
    assert f"MFU {share:.1f}% of 1 TFLOP/s" in shown

    step = lm_step.theirs(CASE, np.zeros((2, 64), int), False)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    whole = 3 * 2 * 64 * TINY.layers * 4 * 64 * 64  # operations of attention, half of which are causal
    assert counter.get_total_flops() == CASE.flops + whole / 2


@pytest.mark.slow
def test_a_stage_2_step_is_timed_against_pytorch(capsys):
    found = stage2_step.main(SIZES, peak=1e12, rounds=1)
    assert found["ours"] > 0 and found["PyTorch, compiled"] > 0
    assert capsys.readouterr().out.count("MFU") == 2


def test_the_benchmarks_step_is_compiled_once(caplog):
    case = dynamic_tokens.case(dynamic_tokens.drawn_lengths(), dynamic_tokens.MAX_TOKENS, 12, SIZES)
    with caplog.at_level("WARNING", logger="jax"), jax.log_compiles():
        for _ in range(2):
            case.step()
    assert sum("Compiling jit(step_fn)" in message for message in caplog.messages) == 1


def test_the_peer_of_a_stage_2_step_reads_the_rows_that_ours_reads():
    case = dynamic_tokens.case(dynamic_tokens.drawn_lengths(), dynamic_tokens.MAX_TOKENS, 12, SIZES)
    keep, index = case.batch["keep"][0], case.batch["feature_index"][0]
    where, patches = stage2_step.sources(case)
    assert (where == np.flatnonzero(index >= 0)).all() and len(where)
    images = patches // 256
    for image in np.unique(images):  # each its own kept patches, in their order
        assert (patches[images == image] % 256 == np.flatnonzero(keep[image])).all()


def test_the_other_cases_run_in_bfloat16(capsys):
    vit.main(2, "bfloat16", ViTConfig(32, 16, 32, 2, 2, 64, biases="qkv"), peak=1e12, rounds=1)
    shape = ImageTokenizerConfig(heads=2, mlp_width=64, merger_depth=1, codes=32, code_width=8)
    tokenizer_forward.main(1, "bfloat16", 32, shape, rounds=1)
    generation.main({"tiny": (TINY, 512)}, "bfloat16", rounds=1)
    shown = capsys.readouterr().out
    assert shown.count("times as fast") == 5 and shown.count("MFU") == 4
    assert timing.ceiling(side=64, products=2) > 0


def test_a_gpu_that_pytorch_lacks_is_said(monkeypatch):
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    with pytest.raises(SystemExit, match="PyTorch has none"):
        timing.prepare()


def test_another_commit_is_compared_by_title(capsys):
    timing.compare("a title", lambda: None, {"peer": lambda: None}, 1, flops=1.0, peak=1.0)
    assert against_commit.read(capsys.readouterr().out).keys() == {"a title"}
    old, new = {"x": [1.0, 3.0, 2.0], "gone": [1.0]}, {"x": [1.0, 1.0, 5.0]}
    assert against_commit.table(old, new)[2:] == ["| x | 2.0000 | 1.0000 | 0.500 |", "only in one tree: gone"]


def test_all_aids_together_make_laptop():
    for stage in ("selector", "tokenizer", "pixel_decoder"):
        given = resolve.load(f"{stage}:laptop-lavit")
        for name, value in aids.overrides(stage, aids.ARMS["all (laptop)"]).items():
            section, _, rest = name.partition(".")
            given[section].update_from_flattened_dict({rest: value})
        found, wanted = (resolve.parse(c) for c in (given, resolve.load(f"{stage}:laptop")))
        assert dataclasses.replace(found, name=wanted.name, size=wanted.size) == wanted


def test_seeds_are_summed_up_with_intervals_over_runs_and_examples(tmp_path, capsys):
    runs = []
    for seed, gain in enumerate((0.5, 0.25)):
        runs.append(tmp_path / str(seed))
        folder = runs[-1] / "evaluation" / "small_objects"
        folder.mkdir(parents=True)
        sections = ("text_to_image", "text_to_image_strict", "questions", "caption")
        scores = {key: {"overall": 0.5 + gain} for key in sections}
        scores |= dict.fromkeys(("reconstruction", "reconstruction_random_selection", "tokens_per_image"), 1.0)
        scores |= {"tokens_follow_objects": 1.0, "seconds": {"stage3": 120.0}}
        (runs[-1] / "scores.json").write_text(json.dumps(scores))
        outcomes = {"small_objects/slices": [1] * 8}
        outcomes["small_objects/global_view"] = [0] * int(8 * gain) + [1] * int(8 - 8 * gain)
        (folder / "outcomes.json").write_text(json.dumps(outcomes))
    seeds.main(runs)
    output = capsys.readouterr().out
    assert "| questions overall | 0.875 | 1.000, 0.750 |" in output and "| minutes | 2.000 | 2.000, 2.000 |" in output
    found = re.search(r"small objects, slices - whole image: \+0\.375 \[\+(\S+), \+(\S+)\]", output)
    assert found and float(found[1]) < 0.25 and float(found[2]) >= 0.5 and "best of 4" not in output
