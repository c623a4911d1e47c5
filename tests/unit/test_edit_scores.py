"""The scores of edits and compositions, with a generator that draws what the test says."""

import dataclasses
import json
import types

import numpy as np
import pytest

from unimm_jax.data import scene_compositions, scene_edits, scenes
from unimm_jax.evals import report_page
from unimm_jax.evals.base import Context
from unimm_jax.evals.compositions import Compositions, CompositionsOptions, prompt_of
from unimm_jax.evals.edits import OFFSET, Edits, EditsOptions
from unimm_jax.evals.generation import EVALUATION_SEED
from unimm_jax.evals.scene_detector import detect, edit_exact, edit_right

CONTEXT = Context(None, None, None, 0, None, "run/stage3", {}, None)
EDITS = 12
BLANK = np.full((64, 64, 3), 220, np.uint8)


class FakeGenerator:
    """Edits right up to turn `good`; draws compositions right if `composes`.

    It draws nothing for a source or a part of a prompt that is that of another example.
    """

    def __init__(self, good, composes=True):
        self.decoders = {"pixel_decoder": None}
        data = types.SimpleNamespace(image_size=64, image_prompts="features_last")
        self.config = types.SimpleNamespace(data=data)
        self.good, self.composes, self.asked, self.layouts, self.sources = good, composes, [], [], []

    def edit_images(self, images, instructions, sampling, seed):
        turns = len(instructions[0])
        chains = [scene_edits.draw_chain(EVALUATION_SEED, "test", turns * OFFSET + i, turns) for i in range(EDITS)]
        assert [[edit.instruction for edit in chain] for chain in chains] == instructions
        self.asked.append((sampling.guidance, sampling.temperature))
        self.sources.append(np.array_equal(images[3], scenes.render(chains[3][0].source)))
        good = self.good if self.sources[-1] else 0
        made = [[scenes.render(chain[turn].target) for chain in chains] for turn in range(turns)]
        return [np.stack(row if turn < good else [BLANK] * EDITS) for turn, row in enumerate(made)]

    def tokenize(self, images):
        return images, None

    def decode(self, codes, keep):
        return codes

    def compose_images(self, prompts, sampling, seed, image_prompts=""):
        self.layouts.append(image_prompts)
        found = []
        for i, prompt in enumerate(prompts):
            item = scene_compositions.draw_composition(EVALUATION_SEED, "test", i)
            parts = [*zip(prompt, prompt_of(item, 64), strict=False)]
            whole = self.composes and len(prompt) == 2 and all(np.array_equal(a, b) for a, b in parts)
            found.append(scenes.render(item.target) if whole else BLANK)
        return np.stack(found)


@pytest.mark.parametrize(("good", "single", "first", "two"), [(0, 0, 0, 0), (1, 1, 1, 0), (2, 1, 1, 1)])
def test_edits_are_scored_by_turn(good, single, first, two):
    generator = FakeGenerator(good)
    options = EditsOptions(edits=EDITS, chains=EDITS, guidance=2.0, temperature=0.5)
    result = Edits(options).score(generator, CONTEXT)
    found = [result.scores[name] for name in ("edit_single", "edit_first_of_two", "edit_two_turns")]
    assert found == [single, first, two] and generator.asked == [(2.0, 0.5)] * 4
    assert generator.sources == [True, False] * 2
    assert set(result.scores["edit_single_by_kind"].values()) == {float(single)}
    assert result.scores["edit_exact_reconstruction"] == 1
    assert result.scores["edit_single_exact"] == single and result.scores["edit_two_turns_exact"] == two
    assert result.scores["edit_two_turns_copied"] == 0
    assert result.scores["edit_single_copied"] == result.scores["edit_single_without_source"] == 0
    assert result.scores["edit_single_other_source"] == result.scores["edit_two_turns_other_source"] == 0
    assert result.outcomes == {"edit_single": [single == 1] * EDITS, "edit_two_turns": [two == 1] * EDITS}
    rows = result.examples["edits"]
    assert [row["right"] for row in rows] == [[single == 1]] * 12 + [[first == 1, two == 1]] * 10


def test_an_edit_that_changes_the_rest_is_not_exact():
    """A larger object, or another background, leaves an edit right by its objects."""
    edit = next(e for i in range(50) if not (e := scene_edits.draw_chain(0, "test", i, 1)[0]).free)
    resized = [dataclasses.replace(o, radius=sum(scenes.RADII) - o.radius) for o in edit.target.objects]
    others = [dataclasses.replace(edit.target, background_seed=seed) for seed in range(30)]
    others.sort(key=lambda scene: scenes.render(scene).mean())
    cases = [edit.target, dataclasses.replace(edit.target, objects=tuple(resized)), others[0], others[-1]]
    images = [scenes.render(case) for case in cases]
    assert all(edit_right(edit, detect(image)) for image in images)
    found = [edit_exact(edit, image) for image in images]
    assert found[:2] == [True, False] and not all(found[2:])


@pytest.mark.parametrize("composes", [True, False])
def test_compositions_are_scored_with_and_without_parts(composes):
    result = Compositions(CompositionsOptions(compositions=8)).score(FakeGenerator(0, composes), CONTEXT)
    assert result.scores["composition"] == float(composes)
    controls = ("without_first", "without_second", "other_first", "other_second")
    assert {result.scores[f"composition_{name}"] for name in controls} == {0.0}
    assert result.outcomes["composition"] == [composes] * 8
    assert [row["right"] for row in result.examples["compositions"]] == [composes] * 8


@pytest.mark.parametrize(("given", "used"), [("", "features_last"), ("codes", "codes")])
def test_the_layout_of_compositions_is_the_models_or_the_given_one(given, used):
    generator = FakeGenerator(0)
    result = Compositions(CompositionsOptions(compositions=4, image_prompts=given)).score(generator, CONTEXT)
    assert generator.layouts == [used] * 5 and result.settings["composition_image_prompts"] == used


def test_the_zero_shot_compositions_of_stage_2_stand_beside_those_of_stage_3(tmp_path):
    result = Compositions(CompositionsOptions(compositions=4)).score(FakeGenerator(0), CONTEXT)
    for name, score in (("evaluation", 1.0), ("evaluation_stage2", 0.25)):
        (tmp_path / name).mkdir()
        found = result.scores | {"composition": score, "evaluation_seconds": 1.0}
        (tmp_path / name / "scores.json").write_text(json.dumps(found))
    (tmp_path / "evaluation_stage2" / "done.json").write_text('{"seconds": 7.5}')
    page, scores = report_page.build(tmp_path)
    assert scores["composition"] == 1 and scores["composition_zero_shot"] == 0.25
    assert scores["seconds"]["evaluation_stage2"] == 7.5
    assert '<td>zero-shot, after stage 2</td><td class="n">0.250</td>' in page.read_text()


def test_small_objects_across_patches_stand_beside_those_in_the_middle(tmp_path):
    for name, slices in (("evaluation", 0.75), ("evaluation_across", 0.5)):
        (tmp_path / name).mkdir()
        found = {"small_objects": {"slices": slices, "global_view": 0.25}, "evaluation_seconds": 1.0}
        (tmp_path / name / "scores.json").write_text(json.dumps(found))
    page, scores = report_page.build(tmp_path)
    assert scores["small_objects"]["slices"] == 0.75 and scores["small_objects_across"]["slices"] == 0.5
    assert '<td>across patches, read with slices</td><td class="n">0.500</td>' in page.read_text()


def test_without_a_decoder_nothing_is_scored(capsys):
    generator = FakeGenerator(2)
    generator.decoders = {}
    context = Context(types.SimpleNamespace(name="x"), None, None, 0, None, "run", {}, None)
    assert Edits(EditsOptions()).score(generator, context).scores == {}
    assert Compositions(CompositionsOptions()).score(generator, context).scores == {}
    assert capsys.readouterr().out.count("no decoder is beside the model") == 2
