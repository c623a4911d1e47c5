"""The scores of stories, with a generator that writes and draws what the test says."""

import types

import numpy as np
import pytest

from unimm_jax.data import scene_edits, scene_stories, scenes
from unimm_jax.evals import report_page, score_table
from unimm_jax.evals.base import Context
from unimm_jax.evals.generation import EVALUATION_SEED
from unimm_jax.evals.stories import OFFSET, Stories, StoriesOptions, is_consistent, judged_steps

CONTEXT = Context(types.SimpleNamespace(name="x"), None, None, 0, None, "run", {}, None)
STORIES = 8
BLANK = np.full((64, 64, 3), 220, np.uint8)


def drawn():
    return [scene_stories.draw_story(EVALUATION_SEED, "test", OFFSET + i, 1) for i in range(STORIES)]


class FakeGenerator:
    """Continues every story with its own edit, then ends it. Images are right from the prompts of which `sees` is true.

    The ids of an image are its row in `images`.
    """

    answer_length = 40

    def fits(self, prompt):
        return True

    def __init__(self, sees=lambda kinds: "ImageIn" in kinds, starts=True):
        self.decoders = {"pixel_decoder": None}
        self.config = types.SimpleNamespace(data=types.SimpleNamespace(image_size=64))
        self.sees, self.starts, self.images = sees, starts, []

    def decoder_name(self, name):
        return name or "pixel_decoder"

    def continue_until_image(self, prompts, sampling=None, seed=0, streams=None):
        found = []
        for i, prompt in zip(streams or range(len(prompts)), prompts, strict=True):
            kinds = [type(segment).__name__ for segment in prompt.document]
            assert kinds[:3] == ["Special", "Text", "ImageIn"]
            assert np.array_equal(prompt.images[0], scenes.render(drawn()[i].scenes[0]))
            if kinds[3:] == ["Text"]:
                found.append(("", self.starts))
            else:  # caption and image; after the next image, the end
                found.append((drawn()[i].edits[0].instruction, True) if len(kinds) == 3 else ("", False))
        return found

    def continue_with_image(self, prompts, sampling, seed, streams=None):
        for i, prompt in zip(streams or range(len(prompts)), prompts, strict=True):
            right = self.sees([type(segment).__name__ for segment in prompt.document])
            self.images.append(scenes.render(drawn()[i].scenes[1]) if right else BLANK)
        return np.arange(len(self.images) - len(prompts), len(self.images))

    def codes(self, ids):
        return ids, ids

    def decode(self, codes, keep, decoder="", seed=0):
        return np.stack([self.images[i] for i in codes])

    def input_size(self, images):
        return images


@pytest.mark.parametrize(
    ("generator", "image", "start", "without", "consistent"),
    [
        (FakeGenerator(), 1, 1, 0, 1),
        (FakeGenerator(lambda kinds: True), 1, 1, 1, 1),
        (FakeGenerator(lambda kinds: False), 0, 1, 0, 0),
        (FakeGenerator(starts=False), 0, 0, 0, 1),
    ],
)
def test_stories_are_scored(generator, image, start, without, consistent):
    result = Stories(StoriesOptions(stories=STORIES)).score(generator, CONTEXT)
    assert result.scores == {
        "story_image": image,
        "story_image_start": start,
        "story_image_without_image": without,
        "story_consistent": consistent,
        "story_instruction": 1,
        "story_images": 1,
    }
    rows = result.examples["stories"]
    assert len(rows) == STORIES and [row["right"] for row in rows] == [consistent == 1] * STORIES
    for row, story in zip(rows, drawn(), strict=True):
        assert row["caption"] == story.caption and row["texts"] == [story.edits[0].instruction]
        assert row["image"].shape == (132, 262, 3)
    assert "image after an instruction" in score_table.table(result.scores)
    assert "<th>stories</th>" in "".join(report_page.score_tables(result.scores))


def chain():
    """An edit that adds an object, and one that moves it."""
    scene = scenes.Scene("single", (scenes.SceneObject("circle", "red", 0.1, 0.125, 0.125),), 3)
    first = scene_edits.read_edit("add a blue square", scene)
    second = scene_edits.read_edit("move the square to the top right corner", first.target, first.free)
    return scene, ["add a blue square", scenes.render(first.target), second.instruction, scenes.render(second.target)]


def marks(parts):
    steps = judged_steps(chain()[0], parts)
    return [(step.is_possible, step.is_right) for step in steps], is_consistent(steps)


def test_documents_are_judged_by_their_own_instructions():
    _, (add, added, move, moved) = chain()
    assert marks([add, added, move, moved]) == ([(True, True)] * 2, True)
    assert marks([add, added]) == ([(True, True)], True)
    assert marks([]) == ([], False)
    assert marks([add]) == ([(True, False)], False)  # no image
    assert marks([add, added, move]) == ([(True, True), (True, False)], False)
    assert marks([added]) == ([(False, False)], False)  # no instruction
    assert marks([add, moved, added]) == ([(True, True), (False, False)], False)
    assert marks([move, moved]) == ([(False, False)], False)  # there is no square
    assert marks([add, BLANK, move, moved]) == ([(True, False), (False, False)], False)  # nothing is known after it
    assert marks(["a red circle", added]) == ([(False, False)], False)


def test_the_report_shows_documents_with_their_texts(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    item = {"file": "a.png", "caption": "a <b>", "texts": ["add a cross", ""], "marks": [True, False], "right": False}
    figure = report_page.story_figure(tmp_path, item)
    assert (
        "a &lt;b&gt;<br>" in figure
        and '<span class="ok">✓</span> add a cross' in figure
        and "✗</span> no text" in figure
    )
    assert "not continued" in report_page.story_figure(tmp_path, item | {"texts": [], "marks": []})


def test_without_a_decoder_nothing_is_scored(capsys):
    generator = FakeGenerator()
    generator.decoders = {}
    assert Stories(StoriesOptions()).score(generator, CONTEXT).scores == {}
    assert "no decoder is beside the model" in capsys.readouterr().out
