"""Verdicts as text and as JSON, captions of scenes read back, and the bootstrap."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unimm_jax.data import scene_language, scenes
from unimm_jax.data.scene_language import Description
from unimm_jax.enhancement.verdicts import CATEGORIES, Verdict, from_json, from_text, question
from unimm_jax.errors import DataError
from unimm_jax.evals.bootstrap import paired_bootstrap

TEXT = "two red circles and a blue square. object yes, count no, color yes, spatial yes, overall no"
VERDICT = Verdict("two red circles and a blue square", True, False, True, True)
PLAIN = dict(seen="a cat", object=True, count=True, color=False, spatial=True)


def test_the_text_of_a_verdict():
    assert VERDICT.to_text() == TEXT and from_text(TEXT) == VERDICT
    assert not VERDICT.good and VERDICT.number_right == 3 and Verdict("", True, True, True, True).good
    assert question("a red circle") == "does the image show a red circle?"


@given(st.text(max_size=60), st.tuples(*[st.booleans()] * 4))
def test_every_verdict_is_read_back_from_its_text_and_its_json(seen, flags):
    verdict = Verdict(seen, *flags)
    assert from_text(verdict.to_text()) == verdict
    if verdict.seen:
        assert from_json(verdict.to_json()) == verdict


@pytest.mark.parametrize("flags", [(True,) * 4, (False,) * 4, (True, False, True, False)])
def test_the_last_verdict_of_a_text_counts(flags):
    quoted = Verdict(TEXT, *flags)
    assert from_text(quoted.to_text()) == quoted and quoted.seen == TEXT


@pytest.mark.parametrize(
    ("text", "read"),
    [
        (f"  {TEXT.upper()}. ", True),
        (TEXT.replace(", ", ",  ").replace(". ", ".\n"), True),
        ("", False),
        ("two red circles", False),
        (TEXT.removesuffix(", overall no"), False),
        (TEXT.replace("overall no", "overall yes"), False),  # contradicts the categories
        (TEXT.replace("count no", "count maybe"), False),
        (TEXT.replace("spatial yes, ", ""), False),
        (f"{TEXT}, and more", False),
        (TEXT.replace("object yes, count no", "count no, object yes"), False),
    ],
)
def test_malformed_texts_are_none(text, read):
    found = from_text(text)
    assert (found is not None) == read
    if found is not None:
        assert [found.category(name) for name in CATEGORIES] == [True, False, True, True]


def test_verdicts_from_json_in_both_forms():
    long = dict(
        seen="a cat.", object={"ok": True, "reason": "there"}, counting={"ok": True}, colour=False, spatial=True
    )
    found = from_json(long | {"overall": "good"})
    assert found == Verdict("a cat", True, True, False, True, {"object": "there"})
    assert from_json(PLAIN) == Verdict("a cat", True, True, False, True)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "is list, not an object"),
        ({}, r"no seen \(a text\), no object \(true or false\), no count .*, no color .*, no spatial"),
        (PLAIN | {"count": None}, "^a verdict has no count .true or false.$"),
        (PLAIN | {"color": "yes"}, "no color"),
        (PLAIN | {"object": {"reason": "x"}}, "no object"),
        (PLAIN | {"object": {"ok": 1}}, "no object"),
        (PLAIN | {"object": {"ok": True, "reason": 3}}, "no object"),
        (PLAIN | {"seen": " . "}, "^a verdict has no seen .a text.$"),
    ],
)
def test_incomplete_json_is_refused_by_name(value, message):
    with pytest.raises(DataError, match=message):
        from_json(value)


# ---- The language of scenes ------------------------------------------------------------------------------------------


def test_every_caption_of_a_scene_is_read():
    relations = 0
    for index in range(400):
        scene = scenes.draw_scene(3, "train", index)
        truth = sorted((o.shape, o.colour) for o in scene.objects)
        for text in scenes.captions(scene):
            found = scene_language.parse(text)
            coloured = all(colour for _, colour in found.objects)
            assert sorted(shape for shape, _ in found.objects) == [shape for shape, _ in truth], text
            assert not coloured or sorted(found.objects) == truth, text
            if found.relation is not None:
                relations += 1
                first, second = (
                    next(o for o in scene.objects if o.shape == shape and colour in (None, o.colour))
                    for shape, colour in found.objects
                )
                assert found.relation in scenes.relations(first, second), text
    assert relations > 100


@pytest.mark.parametrize("task", scenes.TASKS)
def test_every_prompt_is_read(task):
    for index in range(100):
        prompt = scenes.draw_prompt(task, 5, index)
        assert scene_language.parse(prompt.text) == Description(prompt.objects, prompt.relation)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a cat",
        "two circle",
        "a circles",
        "red circle",
        "a red blue circle",
        "two circles left of a square",
        "circle",
    ],
)
def test_other_texts_are_refused(text):
    with pytest.raises(DataError, match="is not a caption or prompt of the scenes"):
        scene_language.parse(text)


def test_objects_are_described_in_words():
    red, plain = ("circle", "red"), ("cross", None)
    assert scene_language.describe([]) == "nothing"
    assert scene_language.describe([red, plain, red]) == "two red circles and a cross"
    assert scene_language.describe([red, None, plain, None]) == "a red circle, something unclear and a cross"
    assert scene_language.describe([red] * 5) == "many red circles"
    assert scene_language.parse(scene_language.describe([red] * 4)).objects == (red,) * 4


# ---- Bootstrap -------------------------------------------------------------------------------------------------------


def test_the_interval_of_a_paired_difference():
    rng = np.random.default_rng(0)
    base = rng.random(200)
    noise = rng.normal(0.1, 0.05, 200)
    found = paired_bootstrap([base + noise], [base])
    low, high = found.low, found.high
    assert found.mean == pytest.approx(noise.mean())
    error = noise.std() / np.sqrt(200)
    assert low == pytest.approx(noise.mean() - 1.96 * error, abs=0.3 * error)  # the spread of `base` does not count
    assert high == pytest.approx(noise.mean() + 1.96 * error, abs=0.3 * error)
    assert paired_bootstrap([base + noise], [base]) == found
    same = paired_bootstrap([np.array([1, 0])], [np.array([1, 0])])
    assert (same.mean, same.low, same.high) == (0, 0, 0)
    for a, b in (([1], [1, 2]), ([], [])):
        with pytest.raises(ValueError, match="paired arms need"):
            paired_bootstrap([np.array(a)], [np.array(b)])
