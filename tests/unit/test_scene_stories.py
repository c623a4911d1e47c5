"""Stories of scenes: their parts, instructions that are read back, and the data sources of scenes."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unimm_jax.data import scene_edits, scene_stories, scenes, sources
from unimm_jax.data.outlines import flatten, outline
from unimm_jax.data.scene_edits import read_edit
from unimm_jax.errors import DataError

CIRCLE = scenes.SceneObject("circle", "red", 0.1, 0.125, 0.125)
SQUARE = scenes.SceneObject("square", "blue", 0.1, 0.625, 0.625)
SCENE = scenes.Scene("two", (CIRCLE, SQUARE), 3)


def placed(scene, free):
    """Shapes, colors and cells of a scene's objects; None for the cells of those that may be anywhere."""
    return [(o.shape, o.colour, None if i in free else scenes.cell(o)) for i, o in enumerate(scene.objects)]


def test_a_story_alternates_texts_and_images_and_starts_with_the_caption():
    story = scene_stories.draw_story(0, "train", 4, 3)
    assert story.content[::2] == (story.caption, *(edit.instruction for edit in story.edits))
    assert story.content[1::2] == (0, 1, 2, 3) and len(story.scenes) == 4
    assert story.caption == scenes.captions(story.scenes[0])[0]
    assert all(edit.source == scene for edit, scene in zip(story.edits, story.scenes, strict=False))


@pytest.mark.parametrize("split", scenes.SPLITS)
def test_all_scenes_of_a_story_are_of_its_split(split):
    for i in range(60):
        for scene in scene_stories.draw_story(0, split, i, 1 + i % 3).scenes:
            assert scenes.layout_split(scene.objects) == split


def test_records_are_interleaved_documents():
    source = sources.open_source("scene_stories:count=7,size=32")
    assert len(source) == 7 and source.evaluator == "stories"
    for i in range(7):
        record = source[i]
        story = scene_stories.draw_story(0, "train", i, 1 + i % 3)
        assert record.content == story.content and len(record.images) == 2 + i % 3
        assert np.array_equal(record.images[-1], scenes.render(story.scenes[-1], 32))
        texts, codes = flatten(record)
        assert len(texts) == 2 + i % 3 and len(outline(codes, len(record.images)).content) == 2 * len(texts)
    assert len(sources.open_source("scene_stories:turns=1")[2].images) == 2
    assert sources.open_source("scene_stories", "test")[0].content != source[0].content
    with pytest.raises(DataError, match="scene_stories has no option 'jitter'; it has count, seed, size, turns"):
        sources.open_source("scene_stories:jitter=2")


@pytest.mark.parametrize(
    ("description", "fingerprint"),
    [
        ("scenes", "scenes v1 {} 12000 0 1.0 64"),
        ("scenes:count=5,jitter=9,size=32,seed=3", "scenes v1 {} 5 3 9.0 32"),
        ("scene_edits", "scene_edits v2 {} 6000 0 64 2"),
        ("scene_edits:turns=3,size=32,count=7,seed=2", "scene_edits v2 {} 7 2 32 3"),
        ("scene_compositions", "scene_compositions v1 {} 6000 0 64"),
        ("scene_compositions:count=8,seed=1,size=16", "scene_compositions v1 {} 8 1 16"),
        ("scene_stories", "scene_stories v2 {} 6000 0 64 3"),
    ],
)
@pytest.mark.parametrize("split", scenes.SPLITS)
def test_fingerprints_and_keys_of_generated_sources_stay(description, fingerprint, split):
    """Checkpoints and records hold these strings."""
    source = sources.open_source(description, split)
    name = description.partition(":")[0]
    assert source.fingerprint() == fingerprint.format(split)
    assert source.name == f"{name}:{split}" and source.key(3) == f"{name}:{split}/3"


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**31 - 1), st.integers(0, 2**31 - 1))
def test_instructions_are_read_back(index, draws):
    """Of random edits in turn, each instruction alone gives its target, up to places that may be any."""
    rng = np.random.default_rng(draws)
    scene, free = scenes.draw_scene(0, "train", index), frozenset()
    for _ in range(3):
        kinds = scene_edits.kinds(scene)
        if not kinds:
            break
        edit = scene_edits.draw_edit(rng, scene, kinds[rng.integers(len(kinds))], free)
        found = read_edit(edit.instruction, scene, free)
        assert (found.kind, found.free, found.instruction) == (edit.kind, edit.free, edit.instruction)
        assert found.source == scene and placed(found.target, found.free) == placed(edit.target, edit.free)
        assert found.target.background_seed == scene.background_seed
        scene, free = edit.target, edit.free


@pytest.mark.parametrize(
    "instruction",
    [
        "",
        "a red circle",
        "make the circle red",  # it is
        "make the red object a circle",  # it is
        "make the triangle blue",  # there is none
        "make the object blue",
        "make the red square blue",
        "move the circle to the top left corner",  # it is there
        "move the square to the top left corner",  # the circle is there
        "add red circle",
        "add an red circle",
        "turn the circle into blue",
        "turn the circle a square",
        "make the circle blue and green",
        "Make the circle blue",
    ],
)
def test_texts_that_ask_for_no_possible_edit_are_none(instruction):
    assert read_edit(instruction, SCENE) is None


def test_what_is_possible_depends_on_the_scene():
    more = dataclasses.replace(SQUARE, x=0.875, y=0.125)
    assert read_edit("remove the circle", SCENE).target.objects == (SQUARE,)
    assert read_edit("remove the circle", dataclasses.replace(SCENE, objects=(CIRCLE,))) is None
    assert read_edit("add a black cross", SCENE).free == frozenset([2])
    assert read_edit("add a black cross", dataclasses.replace(SCENE, objects=(CIRCLE, SQUARE, more, more))) is None
    assert read_edit("make the square red", SCENE) is not None
    assert read_edit("make the square red", dataclasses.replace(SCENE, objects=(CIRCLE, SQUARE, more))) is None
