"""Edits of scenes: instructions, targets, the judge, and the data source."""

import dataclasses
import re

import numpy as np
import pytest

from unimm_jax.data import scene_edits, scenes, sources
from unimm_jax.data.scene_edits import KINDS, SceneEdit
from unimm_jax.errors import DataError
from unimm_jax.evals.scene_detector import detect, edit_right

CHAINS = 120
SHAPE = f"({'|'.join(scenes.SHAPES)})"
COLOR = f"({'|'.join(scenes.COLOURS)})"


def chains(turns=3, split="test"):
    return [scene_edits.draw_chain(0, split, i, turns) for i in range(CHAINS)]


def looks(scene):
    return [(o.shape, o.colour) for o in scene.objects]


def meant(phrase, scene):
    """The indices of the objects that "the red circle", "the circle" or "the red object" can mean."""
    colour, shape = re.fullmatch(rf"the (?:{COLOR} )?(?:{SHAPE}|object)", phrase).groups()
    return [i for i, o in enumerate(scene.objects) if colour in (None, o.colour) and shape in (None, o.shape)]


def applied(edit):
    """The looks and cells after an edit, from the words of its instruction alone; cells of added objects are None."""
    scene, words = edit.source, edit.instruction
    found = [(o.shape, o.colour, (int(o.x * 4), int(o.y * 4))) for o in scene.objects]
    if edit.kind == "add":
        colour, shape = re.fullmatch(rf"(?:add|draw|put in) an? {COLOR} {SHAPE}", words).groups()
        return [*found, (shape, colour, None)]
    (place,) = meant(re.search(rf"the (?:{COLOR} )?(?:{SHAPE}|object)", words)[0], scene)
    shape, colour, cell = found[place]
    rest = words.split("the ", 1)[1]
    if edit.kind == "remove":
        return found[:place] + found[place + 1 :]
    if edit.kind == "recolor":
        colour = re.search(rf" {COLOR}$", rest)[1]
    elif edit.kind == "reshape":
        shape = re.search(rf"an? {SHAPE}$", rest)[1]
    else:
        corner = re.search(r"the (top|bottom) (left|right) corner$", rest)
        cell = (3 * (corner[2] == "right"), 3 * (corner[1] == "bottom"))
    found[place] = (shape, colour, cell)
    return found


def test_the_target_is_what_the_words_of_the_instruction_say():
    for chain in chains():
        for edit in chain:
            after = [(o.shape, o.colour, (int(o.x * 4), int(o.y * 4))) for o in edit.target.objects]
            expected = applied(edit)
            if edit.kind == "add":
                assert after[-1][:2] == expected[-1][:2] and after[-1][2] not in {x[2] for x in after[:-1]}
                after, expected = after[:-1], expected[:-1]
            assert after == expected, edit
            assert edit.source != edit.target and edit.source.background_seed == edit.target.background_seed


def test_every_kind_and_wording_occurs_and_chains_continue():
    found = chains()
    first = [chain[0].kind for chain in found]
    assert all(first.count(kind) >= CHAINS / len(KINDS) / 2 for kind in KINDS)
    starts = {edit.instruction.split()[0] for chain in found for edit in chain}
    assert starts == {wording.split()[0] for kind in KINDS for wording in scene_edits.WORDINGS[kind]}
    for chain in found:
        assert all(a.target == b.source for a, b in zip(chain, chain[1:], strict=False))


def test_the_judge_accepts_targets_and_refuses_sources_and_other_edits():
    edits = [edit for chain in chains() for edit in chain]
    right = [edit_right(edit, detect(scenes.render(edit.target))) for edit in edits]
    assert all(right)
    assert not any(edit_right(edit, detect(scenes.render(edit.source))) for edit in edits)
    edit = chains()[0][0]
    objects = edit.target.objects
    more = scenes.SceneObject("cross", "black", 0.1, 0.5, 0.5)
    for wrong in ((*objects, more), objects[1:]):
        assert not edit_right(edit, detect(scenes.render(dataclasses.replace(edit.target, objects=wrong))))


def test_an_added_object_may_be_anywhere_until_it_is_moved():
    circle = scenes.SceneObject("circle", "red", 0.1, 0.125, 0.125)
    square = scenes.SceneObject("square", "blue", 0.1, 0.625, 0.625)
    scene = scenes.Scene("single", (circle,), 3)
    added = SceneEdit(
        "add", "add a blue square", scene, dataclasses.replace(scene, objects=(circle, square)), frozenset([1])
    )

    def image(*objects):
        return detect(scenes.render(dataclasses.replace(scene, objects=objects)))

    elsewhere = dataclasses.replace(square, x=0.875, y=0.125)
    assert edit_right(added, image(circle, elsewhere))
    assert not edit_right(added, image(dataclasses.replace(circle, x=0.375), square))
    assert not edit_right(added, image(circle, dataclasses.replace(elsewhere, colour="green")))
    rng = np.random.default_rng(0)
    moves = [scene_edits.draw_edit(rng, added.target, "move", added.free) for _ in range(20)]
    for move in moves:
        assert move.free == (frozenset([1]) if move.target.objects[1] == square else frozenset())
    removed = [scene_edits.draw_edit(rng, added.target, "remove", added.free) for _ in range(20)]
    assert {edit.free for edit in removed} == {frozenset(), frozenset([0])}


@pytest.mark.parametrize("split", scenes.SPLITS)
def test_all_layouts_of_a_chain_are_of_its_split(split):
    for chain in chains(3, split):
        for scene in (chain[0].source, *(edit.target for edit in chain)):
            assert scenes.layout_split(scene.objects) == split


def test_no_edit_leads_back_to_an_earlier_scene_of_its_chain():
    for chain in chains(3):
        seen = [detect(scenes.render(edit.source)) for edit in chain]
        for last, edit in enumerate(chain):
            assert not any(edit_right(edit, found) for found in seen[: last + 1])


def test_no_chain_ends_in_a_scene_that_allows_no_edit():
    same = scenes.SceneObject("circle", "red", 0.1, 0.125, 0.125)
    full = tuple(dataclasses.replace(same, x=0.125 + 0.25 * i) for i in range(4))
    assert scene_edits.kinds(scenes.Scene("count", full, 0)) == []
    for i in range(1500):  # drawn without a look at what follows, some of these ended there
        assert len(scene_edits.draw_chain(0, "train", i, 3)) == 3


def test_records_hold_one_edit_or_a_conversation():
    source = sources.open_source("scene_edits:count=9,turns=3,size=32")
    assert len(source) == 9 and source[4].images[0].shape == (32, 32, 3)
    single, double, triple = (source[i] for i in range(3))
    assert single.instruction and len(single.images) == 2 and not single.messages
    assert [len(r.images) for r in (double, triple)] == [3, 4]
    assert [m.content[-1] for m in triple.messages if m.role == "assistant"] == [1, 2, 3]
    chain = scene_edits.draw_chain(0, "train", 1, 2)
    assert [m.content[-1] for m in double.messages if m.role == "user"] == [edit.instruction for edit in chain]
    assert np.array_equal(double.images[2], scenes.render(chain[1].target, 32))
    assert sources.open_source("scene_edits:count=9", "test")[0].instruction != single.instruction
    assert source.fingerprint() != sources.open_source("scene_edits:count=9,turns=2,size=32").fingerprint()


@pytest.mark.parametrize(
    ("options", "reason"),
    [("colors=3", "no option"), ("turns=x", "not a number"), ("turns=0", "at least 1"), ("seed=-1", "not be negative")],
)
def test_wrong_options_are_named(options, reason):
    with pytest.raises(DataError, match=reason):
        sources.open_source(f"scene_edits:{options}")
