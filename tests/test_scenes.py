import json
import pathlib

import numpy as np
import pytest

from unimm_jax.data import scenes
from unimm_jax.evals import scenes as benchmark


def test_a_scene_is_a_function_of_its_arguments():
    a, b = scenes.draw_scene(3, "train", 7), scenes.draw_scene(3, "train", 7)
    assert a == b
    assert np.array_equal(scenes.render(a), scenes.render(b))
    assert a != scenes.draw_scene(3, "train", 8)
    assert a != scenes.draw_scene(4, "train", 7)


def test_splits_share_no_layout():
    def layout(s):
        return tuple(sorted((o.shape, o.colour, int(o.x * 4), int(o.y * 4)) for o in s.objects))

    train = {layout(scenes.draw_scene(0, "train", i)) for i in range(1500)}
    test = {layout(scenes.draw_scene(0, "test", i)) for i in range(1500)}
    assert not train & test
    with pytest.raises(ValueError, match="train"):
        scenes.draw_scene(0, "validation", 0)


@pytest.mark.parametrize("jitter", [0.0, 1.0, 9.0])
def test_detector_reads_true_renders(jitter):
    hits = 0
    for i in range(600):
        scene = scenes.draw_scene(11, "test", i, jitter)
        found = benchmark.detect(scenes.render(scene))
        hits += benchmark.objects_right(scene, found) == len(scene.objects) == len(found)
    assert hits / 600 >= 0.995


def test_captions_are_true_and_complete():
    for i in range(200):
        scene = scenes.draw_scene(0, "train", i)
        for caption in scenes.captions(scene):
            words = benchmark.content_words(caption)
            numbers = sum(scenes.NUMBERS.index(w) * n for w, n in words.items() if w in scenes.NUMBERS)
            assert numbers == len(scene.objects), (caption, scene)
        assert benchmark.caption_score(scenes.captions(scene)[0], scenes.captions(scene)[0]) == 1


def test_existence_is_balanced_and_answers_hold():
    asked = benchmark.test_questions(5, 100)
    for kind in scenes.QUESTION_KINDS:
        assert sum(row[3] == kind for row in asked) == 100
    assert sum(row[2] == "yes" for row in asked) == sum(row[2] == "no" for row in asked) == 50
    for index, question, answer, kind in asked:
        objects = scenes.draw_scene(5, "test", index).objects
        if kind == "existence":
            there = any(o.shape in question and (o.colour in question or not _colour(question)) for o in objects)
            assert there == (answer == "yes"), (question, answer)
        elif kind == "count":
            shape = next(s for s, p in scenes.PLURALS.items() if p in question)
            assert scenes.NUMBERS.index(answer) == sum(o.shape == shape for o in objects)
        elif kind == "colour":
            assert [o.colour for o in objects if o.shape in question] == [answer]
        elif kind == "shape":
            assert [o.shape for o in objects if o.colour in question] == [answer]


def _colour(question):
    return next((c for c in scenes.COLOURS if f" {c} " in question), None)


def test_some_negatives_are_adversarial():
    near = total = 0
    for i in range(400):
        scene = scenes.draw_scene(0, "train", i)
        question, answer, _ = scenes.questions(scene)[1]
        colour = _colour(question)
        if answer == "no" and colour:
            total += 1
            near += any((o.shape in question) != (o.colour == colour) for o in scene.objects)
    assert near / total > 0.5


def test_judge_follows_the_rules():
    def at(shape, colour, x, y):
        return benchmark.Detection(shape, colour, x, y, 0.15, 0.15)

    two = scenes.Prompt("two_objects", "", (("circle", None), ("square", None)))
    pair = [at("circle", "red", 0.2, 0.5), at("square", "blue", 0.8, 0.5)]
    extra = [*pair, at("cross", "red", 0.5, 0.1)]
    assert benchmark.judge(two, pair) == (True, True)
    assert benchmark.judge(two, extra) == (True, False)
    assert benchmark.judge(two, pair[:1]) == (False, False)
    counting = scenes.Prompt("counting", "", (("circle", None),) * 2)
    assert benchmark.judge(counting, [at("circle", "red", 0.2, 0.2)] * 3) == (False, False)
    assert benchmark.judge(counting, [at("circle", "red", 0.2, 0.2)] * 2) == (True, True)
    left = scenes.Prompt("position", "", (("circle", None), ("square", None)), "left")
    assert benchmark.judge(left, pair)[0]
    assert not benchmark.judge(scenes.Prompt("position", "", left.objects, "above"), pair)[0]
    binding = scenes.Prompt("colour_attribution", "", (("circle", "red"), ("square", "blue")))
    swapped = [at("circle", "blue", 0.2, 0.5), at("square", "red", 0.8, 0.5)]
    assert benchmark.judge(binding, pair)[0] and not benchmark.judge(binding, swapped)[0]


def test_relations_match_the_official_scorer():
    cases = json.loads((pathlib.Path(__file__).parent / "data" / "geneval_relative_position.json").read_text())
    for a, b, expected in cases:
        (ax, ay), (bx, by) = (((q[0] + q[2]) / 2, (q[1] + q[3]) / 2) for q in (a, b))
        widths, heights = a[2] - a[0] + b[2] - b[0], a[3] - a[1] + b[3] - b[1]
        found = scenes.offset_relations(bx - ax, by - ay, widths, heights)
        assert set(map(scenes.relation_phrase, found)) == set(expected), (a, b)


def test_prompts_are_fixed_and_cover_the_tasks():
    for task in scenes.TASKS:
        assert scenes.draw_prompt(task, 1, 2) == scenes.draw_prompt(task, 1, 2)
        assert len({scenes.draw_prompt(task, 1, i).text for i in range(50)}) >= 4
    with pytest.raises(ValueError, match="six"):
        scenes.draw_prompt("style", 0, 0)
