import dataclasses
import json
import types

import jax
import numpy as np
import pytest
from helpers import tiny
from PIL import Image

from unimm_jax import evals, plotting
from unimm_jax.config import ImageDataConfig
from unimm_jax.data import scenes, sources, transforms
from unimm_jax.errors import CheckpointError, ConfigError
from unimm_jax.evals import captions, runner, score_table
from unimm_jax.evals import scene_detector as detector
from unimm_jax.evals import scenes as scenes_eval
from unimm_jax.evals.base import Context, Evaluator, Options, Result

# ---- Registry and options --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", evals.REGISTRY)
def test_every_registered_evaluator_has_complete_options(name):
    kind = evals.get(name)
    assert issubclass(kind, Evaluator) and issubclass(kind.options, Options)
    entry = evals.complete("config.evals.x", {"type": name})
    assert entry == {"type": name} | dataclasses.asdict(kind.options())
    assert evals.problems("x", entry) == []
    assert kind(evals.options_of(entry)).settings == kind.options()


def test_given_options_replace_defaults():
    entry = evals.complete("x", {"type": "scenes", "prompts": 3, "every": 10})
    assert (entry["prompts"], entry["every"], entry["questions"]) == (3, 10, 200)


def test_wrong_entries_are_named():
    with pytest.raises(ConfigError, match="config.evals.x has no type"):
        evals.complete("config.evals.x", {"every": 3})
    with pytest.raises(
        ConfigError, match="no evaluator 'scene'; evaluators are loss, scenes, edits, compositions, small_objects"
    ):
        evals.complete("config.evals.x", {"type": "scene"})
    with pytest.raises(ConfigError, match="'promts'; did you mean 'prompts'"):
        evals.complete("config.evals.x", {"type": "scenes", "promts": 3})
    wrong = evals.complete("x", {"type": "captions", "images": 0, "split": "dev", "every": -1})
    assert [w.split(" ")[0] for w in evals.problems("x", wrong)] == ["x.every", "x.images", "x.split"]


def test_stages_without_a_model_that_reads_images_are_refused():
    entry = evals.complete("x", {"type": "scenes"})
    assert evals.problems("x", entry, tiny("stage2")) == []
    for stage in ("encoder", "text"):
        (problem,) = evals.problems("x", entry, tiny(stage))
        assert problem.startswith("x: it needs a language model that reads images") and stage in problem
        assert evals.problems("x", evals.complete("x", {"type": "loss"}), tiny(stage)) == []


def test_evaluators_follow_the_sources():
    assert evals.default_evals({"sources": "scenes:count=96"}) == ["scenes"]
    assert evals.default_evals({"sources": "scenes ; scenes:seed=2"}) == ["scenes"]
    assert evals.default_evals({"sources": "scene_edits:turns=3;scenes"}) == ["scenes", "edits"]
    assert evals.default_evals({"sources": "/my/scenes;tfds:/other"}) == ["captions"]
    assert evals.default_evals({"sources": "scenes;/my/images"}) == ["scenes", "captions"]
    for name in sources.REGISTRY:
        special = dict.fromkeys(("interleaved", "edit", "text"), "") | dict.fromkeys(("llava", "chat"), "answers")
        special |= dict(scenes="scenes", scene_edits="edits", scene_compositions="compositions")
        special |= dict(scene_stories="stories")
        assert evals.evaluator_of(f"{name}:/my/data") == special.get(name, "captions")
    assert evals.default_evals({"sources": "edit:/my/edits;text:/my/texts.jsonl"}) == ["loss"]
    assert evals.default_evals({"sources": "chat:/my/chat.jsonl;folder:/my/images"}) == ["captions", "answers"]
    with pytest.raises(CheckpointError, match="names no data sources"):
        evals.default_evals({"source": "lavit", "kind": "lavit"})


# ---- Results ---------------------------------------------------------------------------------------------------------


def test_scalars_are_the_numbers_of_the_scores():
    result = Result({"a": 1, "b": {"c": 0.5, "d": {"e": np.float64(2.0)}}, "split": "test", "flag": True})
    result.add(Result({"f": 3.0}, settings={"jitter": 1.0}))
    assert result.scalars() == {"a": 1.0, "b/c": 0.5, "b/d/e": 2.0, "f": 3.0}
    assert result.settings == {"jitter": 1.0}


def test_results_are_written_as_files(tmp_path):
    red = np.full((4, 4, 3), (255, 0, 0), np.uint8)
    rows = [{"file": "a.png", "image": red, "prompt": "red"}, {"question": "?"}]
    runner.write(Result({}, images={"sheet": red}, examples={"samples": rows}), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "examples.json").read_text()) == {
        "samples": [{"file": "a.png", "prompt": "red"}, {"question": "?"}]
    }
    for name in ("a.png", "sheet.png"):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / name)), red)


def test_the_table_shows_every_kind_of_scores():
    own = {"split": "test", "caption": {"exact": 0.25, "words": 0.5}, "images": 12, "tokens_per_image": 8.0}
    assert "0.250 of 12 held-out images" in score_table.table(own)
    assert "of 12 training images" in score_table.table(own | {"split": "train"})
    old = {"caption": {"exact": 1.0}, "images": 600, "tokens_per_image": 8.0}  # written by an older version
    assert "1.000 of 600 training images" in score_table.table(old)
    tasks = dict.fromkeys((*scenes.TASKS, "overall"), 0.5)
    full = {
        "text_to_image": tasks,
        "text_to_image_strict": tasks,
        "questions": dict.fromkeys((*scenes.QUESTION_KINDS, "overall"), 0.75),
        "caption": {"content_words": 0.9, "exact": 0.5},
        "reconstruction": 0.85,
        "reconstruction_by_decoder": {"pixel_decoder": 0.85},
        "reconstruction_random_selection": 0.4,
        "tokens_per_image": 4.0,
        "tokens_follow_objects": 0.6,
        "own_images": own,
        "held_out": {"loss": 1.25},
    }
    table = score_table.table(full)
    for text in ("pixel decoder", "colour attribution", "held-out images", "held-out loss"):
        assert text in table
    assert "U-Net" not in table
    without = {k: v for k, v in full.items() if not k.startswith(("text_to_image", "reconstruction"))}
    assert "questions" in score_table.table(without) and "text to image" not in score_table.table(without)


# ---- Captions, with a generator that answers at once -----------------------------------------------------------------


class FakeGenerator:
    """Says "red" or "blue" by the image's mean; counts the images of each call."""

    def __init__(self, data):
        self.image_tokenizer = types.SimpleNamespace(config=types.SimpleNamespace(data=data))
        self.decoders, self.header = {"pixel_decoder": None}, {"selection": "argmax"}
        self.prompt_length, self.text_tokenizer = 10, types.SimpleNamespace(encode=str.split)
        self.calls = []

    def read_image(self, image):
        return transforms.to_pixels(image, 8)

    def tokenize(self, images):
        keep = np.zeros((len(images), 4), bool)
        keep[:, :3] = True
        return np.zeros((len(images), 4), np.int32), keep

    def generate_text(self, images, questions):
        self.calls.append(len(images))
        assert questions == [""] * len(images)
        return ["a red square" if image[..., 0].mean() > 128 else "a blue disc" for image in images]

    def decode(self, codes, keep, decoder):
        return np.zeros((len(codes), 8, 8, 3), np.uint8)

    def generate_images(self, prompts, sampling, seed):
        assert sampling.guidance == 1.5 and seed == 1000
        return np.zeros((len(prompts), 8, 8, 3), np.uint8)


@pytest.fixture
def folder(tmp_path):
    """130 red images with the caption "a red square", and 20 blue ones with "a blue square"."""
    for i in range(150):
        color = (255, 0, 0) if i < 130 else (0, 0, 255)
        Image.new("RGB", (8, 8), color).save(tmp_path / f"{i:03d}.png")
        (tmp_path / f"{i:03d}.txt").write_text(f"a {'red' if i < 130 else 'blue'} square\n")
    return tmp_path


def scored(sources, held_out=0.2, header_sources=None, **options):
    generator = FakeGenerator(ImageDataConfig(sources="elsewhere", image_size=8, held_out=held_out))
    header = {"sources": sources if header_sources is None else header_sources}
    context = Context(None, None, None, 0, None, "run/stage3", header, None)
    return captions.Captions(captions.CaptionsOptions(**options)).score(generator, context), generator


def test_captions_are_scored_on_the_held_out_split(folder, capsys):
    held_out = [d for d in captions.open_images(ImageDataConfig(str(folder), 8, 0.2), "test")][0]
    truths = [held_out[i].record.captions[0] for i in range(len(held_out))]
    result, _ = scored(str(folder))
    scores = result.scores
    assert scores["split"] == "test" and scores["images"] == len(held_out) < 60
    red = np.mean([t == "a red square" for t in truths])
    assert 0.5 < red < 1
    assert scores["caption"]["exact"] == pytest.approx(red)
    assert scores["caption"]["words"] == pytest.approx(red + (1 - red) * 2 / 3)
    assert scores["tokens_per_image"] == 3
    assert "training images" not in capsys.readouterr().out
    assert len(result.examples["captions"]) == captions.SHOWN_IMAGES == len(result.examples["samples"])
    assert {"reconstruction_pixel_decoder", "kept"} == set(result.images)


def test_training_images_are_scored_on_request_or_without_held_out_ones_and_said(folder, capsys):
    for options in ({"held_out": 0.0}, {"split": "train"}):
        result, generator = scored(str(folder), **options)
        assert result.scores["split"] == "train"
        assert "the scores are of training images" in capsys.readouterr().out
    assert max(generator.calls) <= 64 and sum(generator.calls) == result.scores["images"]
    result, generator = scored(str(folder), split="train", images=10)
    assert result.scores["images"] == 10 == sum(generator.calls)
    assert result.scores["caption"]["exact"] < 1  # evenly spaced: the blue ones at the end are among them


def test_captions_of_a_mixture_leave_out_scenes_and_unreadable_images(folder):
    (folder / "000.png").write_bytes(b"not an image")
    result, _ = scored(f"scenes:count=20;{folder}", split="train", held_out=0.0, images=1000)
    assert result.scores["images"] == 149
    result, _ = scored("scenes:count=20", images=1000)
    assert (result.scores["images"], result.scores["split"]) == (20, "test")


def test_captions_need_sources():
    with pytest.raises(CheckpointError, match="run/stage3 names no data sources"):
        scored("", header_sources="")


def test_word_overlap_counts_right_words():
    assert captions.word_overlap("a Red dog", "a red dog") == 1
    assert captions.word_overlap("a red cat", "a red dog") == pytest.approx(2 / 3)
    assert captions.word_overlap("a red dog runs away now", "a red dog") == 0.5
    assert captions.word_overlap("", "") == 0
    assert captions.first_words(" ".join(map(str, range(20)))) == " ".join(map(str, range(12)))


def test_evenly_spaced_places():
    assert captions.evenly(3, 10) == [0, 1, 2]
    assert captions.evenly(101, 3) == [0, 50, 100]
    assert captions.evenly(1, 5) == [0]


# ---- Scenes ----------------------------------------------------------------------------------------------------------


def test_several_processes_give_no_scores_and_say_so_once(monkeypatch, capsys):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    evaluator = scenes_eval.Scenes(scenes_eval.ScenesOptions())
    context = Context(types.SimpleNamespace(name="stage3:laptop"), None, None, 1, None, None, {}, None)
    assert evaluator.run(context).scalars() == {} == evaluator.run(context).scalars()
    assert capsys.readouterr().out.count("single process") == 1


def test_objects_found_is_the_share_of_all_objects():
    test = [scenes.draw_scene(0, "test", i) for i in range(20)]
    images = np.stack([scenes.render(scene) for scene in test])
    assert scenes_eval.objects_found(test, images) == 1
    assert scenes_eval.objects_found(test, images[::-1]) < 0.3
    first = sum(len(s.objects) for s in test[:10]) / sum(len(s.objects) for s in test)
    half = np.where(np.arange(20)[:, None, None, None] < 10, images, 200).astype(np.uint8)
    assert scenes_eval.objects_found(test, half) == pytest.approx(first)
    assert scenes_eval.objects_found(test, images[:5]) == 1  # only the decoded ones count


def test_rank_correlation_of_tokens_and_objects():
    assert scenes_eval.rank_correlation(np.array([1, 2, 3]), [2, 4, 9]) == pytest.approx(1)
    assert scenes_eval.rank_correlation(np.array([3, 2, 1]), [2, 4, 9]) == pytest.approx(-1)
    assert scenes_eval.rank_correlation(np.array([4, 4, 4]), [2, 4, 9]) == 0


# ---- Detector --------------------------------------------------------------------------------------------------------


def canvas(*items, size=64):
    """Objects (shape, colour, x, y[, radius]) on a plain background."""
    objects = tuple(scenes.SceneObject(s, c, r[0] if r else 0.1, x, y) for s, c, x, y, *r in items)
    return scenes.render(scenes.Scene("mixed", objects, 7), size)


@pytest.mark.parametrize("size", [64, 256])
@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_detector_reads_every_color_of_a_shape(shape, size):
    for colour in scenes.COLOURS:
        (found,) = detector.detect(canvas((shape, colour, 0.3, 0.6), size=size))
        assert (found.shape, found.colour) == (shape, colour)
        assert abs(found.x - 0.3) < 0.02 and abs(found.y - 0.6) < 0.02


def test_detector_ignores_specks_and_empty_images():
    assert detector.detect(canvas()) == []
    image = canvas(("circle", "red", 0.5, 0.5))
    image[2:5, 2:5] = scenes.COLOURS["blue"]
    assert [d.colour for d in detector.detect(image)] == ["red"]


def test_detector_keeps_unclear_shapes_apart_from_clear_ones():
    image = canvas(("square", "green", 0.8, 0.8))
    image[10:14, 4:40] = scenes.COLOURS["red"]  # a bar
    found = detector.detect(image)
    assert [(d.shape, d.colour) for d in found] == [("?", "red"), ("square", "green")]
    assert found[0].x < found[1].x


def test_an_object_counts_only_with_its_look_and_place():
    scene = scenes.Scene("two", (scenes.SceneObject("circle", "red", 0.1, 0.3, 0.3),) * 1, 7)

    def right(*items):
        return detector.objects_right(scene, detector.detect(canvas(*items)))

    assert right(("circle", "red", 0.3, 0.3)) == 1
    assert right(("circle", "red", 0.34, 0.3)) == 1
    assert right(("circle", "red", 0.45, 0.3)) == 0
    assert right(("circle", "blue", 0.3, 0.3)) == 0
    assert right(("square", "red", 0.3, 0.3)) == 0
    assert right() == 0


# ---- Sheets ----------------------------------------------------------------------------------------------------------


def test_sheets_enlarge_small_images_and_fit_others():
    small, large = np.zeros((64, 64, 3), np.uint8), np.full((512, 512, 3), 9, np.uint8)
    assert plotting.enlarged(small).shape == (128, 128, 3) and plotting.enlarged(large).shape == large.shape
    sheet = plotting.grid([small, large, small], 2, gap=2)
    assert sheet.shape == (2 * 130 + 2, 2 * 130 + 2, 3)
    assert (sheet[2:130, 2:130] == 0).all() and (sheet[2:130, 132:260] == 9).all()
    assert (sheet[132:260, 132:260] == 255).all()
    assert plotting.labelled([small, large], ["a", "b"], 2).shape == (128 + 28 + 12, 2 * 134 + 6, 3)


def test_kept_patches_are_framed_and_others_faded():
    image = np.full((8, 8, 3), 100, np.uint8)
    shown = plotting.kept_patches(image, np.array([True, False, False, False]))
    assert (shown[1:3, 1:3] == 100).all() and (shown[0, :4] == 30).all()
    assert (shown[4:, 4:] == 255 - 155 // 5).all()
