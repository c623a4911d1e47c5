"""Compositions of scenes: prompts, targets, the judge, and the data source."""

import collections
import dataclasses
import re

import numpy as np
import pytest

from unimm_jax.data import scene_compositions, scenes, sources
from unimm_jax.errors import DataError
from unimm_jax.evals.scene_detector import detect, looks_right

NUMBER = 80


def looks(objects):
    return collections.Counter((o.shape, o.colour) for o in objects)


def drawn(split="test"):
    return [scene_compositions.draw_composition(0, split, i) for i in range(NUMBER)]


def test_the_target_has_what_the_parts_of_the_prompt_say():
    wordings = set()
    for item in drawn():
        wanted = looks(o for scene in item.images for o in scene.objects)
        if item.kind == "image_text":
            word, colour, shape = re.fullmatch(r"(\w+) an? (\w+) (\w+)", item.text).groups()
            wordings.add(word)
            wanted[shape, colour] += 1
            assert item.parts == (0, item.text)
        else:
            assert item.parts == (0, 1) and len(item.images) == 2 and not item.text
        assert looks(item.target.objects) == wanted
        assert item.target.objects[: len(item.images[0].objects)] == item.images[0].objects
        cells = [(int(o.x * 4), int(o.y * 4)) for o in item.target.objects]
        assert len(set(cells)) == len(cells)
    assert wordings == {"and", "with", "plus"}


def test_the_judge_wants_all_objects_and_nothing_else():
    for item in drawn():
        assert looks_right(item.target, detect(scenes.render(item.target)))
        for scene in item.images:
            assert not looks_right(item.target, detect(scenes.render(scene)))
    item = drawn()[0]
    more = (*item.target.objects, scenes.SceneObject("cross", "black", 0.1, 0.51, 0.51))
    assert not looks_right(item.target, detect(scenes.render(dataclasses.replace(item.target, objects=more))))


@pytest.mark.parametrize("split", scenes.SPLITS)
def test_all_layouts_are_of_the_split(split):
    for item in drawn(split):
        assert all(scenes.layout_split(scene.objects) == split for scene in (*item.images, item.target))


def test_records_are_conversations_with_the_images_in_order():
    source = sources.open_source("scene_compositions:count=6,size=32")
    text, both = source[0], source[1]
    assert [m.content for m in both.messages] == [(0, 1), (2,)] and len(both.images) == 3
    assert text.messages[0].content[0] == 0 and text.messages[1].content == (1,) and len(text.images) == 2
    target = scene_compositions.draw_composition(0, "train", 1).target
    assert np.array_equal(both.images[2], scenes.render(target, 32)) and len(source) == 6
    assert source.fingerprint() != sources.open_source("scene_compositions:count=7,size=32").fingerprint()
    with pytest.raises(DataError, match="no option 'turns'"):
        sources.open_source("scene_compositions:turns=2")
