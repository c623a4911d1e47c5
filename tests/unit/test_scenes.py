import collections
import json
import re

import numpy as np
import pytest
from helpers import ROOT

from unimm_jax.data import scenes
from unimm_jax.evals import scene_detector as detector

SINGULAR = {plural: shape for shape, plural in scenes.PLURALS.items()}
RELATION = re.compile(r"(.+) (left of|right of|above|below) (.+)")
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


def parse(text):
    """A caption or prompt → ([(shape, colour or None)], relation or None), independently of how it is written."""
    match = RELATION.fullmatch(text)
    phrases = [match[1], match[3]] if match else re.split(", | and ", text)
    found = []
    for phrase in phrases:
        number, *colour, noun = phrase.split()
        count = 1 if number in ("a", "an") else ["two", "three", "four"].index(number) + 2
        assert len(colour) <= 1 and (noun in scenes.SHAPES if count == 1 else noun in SINGULAR), text
        assert count > 1 or (number == "an") == (phrase.split()[1][0] in "aeiou"), text
        found += [(SINGULAR.get(noun, noun), colour[0] if colour else None)] * count
    return found, match[2].split()[0] if match else None


def named(objects, shape, colour=None):
    """The only object of a look."""
    (found,) = [o for o in objects if o.shape == shape and colour in (None, o.colour)]
    return found


def holds(relation, a, b):
    """Whether `a` is clearly on that side of `b`: on its axis, further apart than on the other one."""
    dx, dy = b.x - a.x, b.y - a.y
    along, across = (dx, dy) if relation in ("left", "right") else (dy, dx)
    return along * (1 if relation in ("left", "above") else -1) > 0 and abs(along) > abs(across) * 0.5


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
        found = detector.detect(scenes.render(scene))
        hits += detector.objects_right(scene, found) == len(scene.objects) == len(found)
    assert hits / 600 >= 0.995


@pytest.mark.parametrize("jitter", [1.0, 9.0])
def test_captions_are_true_and_complete(jitter):
    relations = collections.Counter()
    for i in range(400):
        objects = scenes.draw_scene(0, "train", i, jitter).objects
        for caption in scenes.captions(scenes.draw_scene(0, "train", i, jitter)):
            looks, relation = parse(caption)
            with_colour = [(o.shape, o.colour) for o in objects]
            without = [(o.shape, None) for o in objects]
            assert sorted(looks, key=str) in (sorted(with_colour), sorted(without, key=str)), (caption, objects)
            if relation:
                a, b = (named(objects, *look) for look in looks)
                assert holds(relation, a, b), (caption, objects)
                assert not holds(OPPOSITE[relation], a, b) and not holds(relation, b, a)
                relations[relation] += 1
    assert len(relations) == 4 and min(relations.values()) > 20


def test_position_answers_hold():
    relations = collections.Counter()
    for i in range(400):
        scene = scenes.draw_scene(0, "train", i)
        for question, answer, kind in scenes.questions(scene):
            if kind == "position":
                first, second = re.fullmatch(r"where is the (\w+) from the (\w+)\?", question).groups()
                a, b = named(scene.objects, first), named(scene.objects, second)
                assert holds(answer, a, b) and not holds(OPPOSITE[answer], a, b), (question, answer, scene)
                relations[answer] += 1
    assert len(relations) == 4 and min(relations.values()) > 20


def test_a_caption_scores_its_right_words():
    truth = "a red circle and two blue squares"  # six content words: one, red, circle, two, blue, square

    def score(caption):
        return detector.caption_score(caption, truth)

    assert score("two blue squares and a red circle") == 1
    assert score("a red circle and two green squares") == pytest.approx(5 / 6)
    assert score("a red circle and three green squares") == pytest.approx(4 / 6)
    assert score("a red circle") == pytest.approx(3 / 6)
    assert score(f"{truth} and a cross") == pytest.approx(6 / 8)  # superfluous words cost
    assert score(f"{truth} {truth}") == pytest.approx(6 / 12)
    assert score("") == score("the of left") == 0


def test_existence_is_balanced_and_answers_hold():
    asked = detector.question_set(5, 100)
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
        else:
            first, second = re.fullmatch(r"where is the (\w+) from the (\w+)\?", question).groups()
            assert holds(answer, named(objects, first), named(objects, second)), (question, answer)


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
        return detector.Detection(shape, colour, x, y, 0.15, 0.15)

    two = scenes.Prompt("two_objects", "", (("circle", None), ("square", None)))
    pair = [at("circle", "red", 0.2, 0.5), at("square", "blue", 0.8, 0.5)]
    extra = [*pair, at("cross", "red", 0.5, 0.1)]
    assert detector.judge(two, pair) == (True, True)
    assert detector.judge(two, extra) == (True, False)
    assert detector.judge(two, pair[:1]) == (False, False)
    counting = scenes.Prompt("counting", "", (("circle", None),) * 2)
    assert detector.judge(counting, [at("circle", "red", 0.2, 0.2)] * 3) == (False, False)
    assert detector.judge(counting, [at("circle", "red", 0.2, 0.2)] * 2) == (True, True)
    left = scenes.Prompt("position", "", (("circle", None), ("square", None)), "left")
    assert detector.judge(left, pair)[0]
    assert not detector.judge(scenes.Prompt("position", "", left.objects, "above"), pair)[0]
    binding = scenes.Prompt("colour_attribution", "", (("circle", "red"), ("square", "blue")))
    swapped = [at("circle", "blue", 0.2, 0.5), at("square", "red", 0.8, 0.5)]
    assert detector.judge(binding, pair)[0] and not detector.judge(binding, swapped)[0]


def test_relations_match_the_official_scorer():
    cases = json.loads((ROOT / "tests" / "data" / "geneval_relative_position.json").read_text())
    for a, b, expected in cases:
        (ax, ay), (bx, by) = (((q[0] + q[2]) / 2, (q[1] + q[3]) / 2) for q in (a, b))
        widths, heights = a[2] - a[0] + b[2] - b[0], a[3] - a[1] + b[3] - b[1]
        found = scenes.offset_relations(bx - ax, by - ay, widths, heights)
        assert set(map(scenes.relation_phrase, found)) == set(expected), (a, b)


def test_prompts_are_fixed_and_cover_the_tasks():
    for task in scenes.TASKS:
        assert scenes.draw_prompt(task, 1, 2) == scenes.draw_prompt(task, 1, 2)
        assert len({scenes.draw_prompt(task, 1, i).text for i in range(50)}) >= 4
        for i in range(50):
            prompt = scenes.draw_prompt(task, 1, i)
            looks, relation = parse(prompt.text)
            assert tuple(looks) == prompt.objects and relation == prompt.relation
    with pytest.raises(ValueError, match="six"):
        scenes.draw_prompt("style", 0, 0)
