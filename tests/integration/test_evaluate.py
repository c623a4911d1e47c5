import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT, command, link, xla_flags
from PIL import Image

from unimm_jax import metrics
from unimm_jax.checkpoint import Checkpoints, read_meta, read_params
from unimm_jax.data.documents import Text
from unimm_jax.errors import CheckpointError, ConfigError, DataError
from unimm_jax.evals import generation, report_page, score_table
from unimm_jax.evals.runner import evaluate

STAGES = ("encoder", "selector", "tokenizer", "records", "pixel_decoder", "text", "stage1", "stage2")  # no U-Net
TOP_LEVEL = {
    "text_to_image", "text_to_image_strict", "questions", "caption", "reconstruction", "reconstruction_by_decoder",
    "reconstruction_random_selection", "decoder", "tokens_per_image", "tokens_follow_objects", "sampling",
    "prompts_per_task", "questions_per_kind", "jitter", "evaluation_seconds", "edit_single", "edit_single_by_kind",
    "edit_single_copied", "edit_single_without_source", "edit_single_exact", "edit_two_turns", "edit_two_turns_copied",
    "edit_two_turns_exact", "edit_exact_reconstruction",
    "edit_two_turns_without_source", "edit_first_of_two", "edit_sampling",
    "edit_single_other_source", "edit_two_turns_other_source", "composition_other_first", "composition_other_second",
    "composition", "composition_by_kind", "composition_without_first", "composition_without_second",
    "composition_sampling", "composition_image_prompts", "story_image", "story_image_start",
    "story_image_without_image", "story_consistent", "story_instruction", "story_images", "story_sampling",
}  # fmt: skip


@pytest.fixture(scope="module")
def evaluated(run, tmp_path_factory):
    """A run directory without the U-Net, evaluated by the command with every evaluator: (directory, output)."""
    root = link(run, tmp_path_factory.mktemp("evaluated"), *STAGES)
    shutil.copytree(run / "stage3", root / "stage3")  # its companions are those beside it
    done = command(
        "evaluate", f"--checkpoint={root}/stage3", f"--output={root}/evaluation",
        "--evals=scenes,edits,compositions,stories,captions,loss", "--prompts=2", "--questions=2", "--images=5",
        "--edits=5", "--chains=2", "--compositions=4", "--stories=3", "--batches=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return root, done.stdout


def test_the_command_writes_scores_examples_and_images(evaluated):
    root, output = evaluated
    folder = root / "evaluation"
    scores = json.loads((folder / "scores.json").read_text())
    assert set(scores) == TOP_LEVEL | {"own_images", "held_out"}
    assert set(scores["text_to_image"]) == set(scores["text_to_image_strict"])
    assert list(scores["reconstruction_by_decoder"]) == ["pixel_decoder"]
    assert (scores["prompts_per_task"], scores["questions_per_kind"], scores["jitter"]) == (2, 2, 1.0)
    assert scores["own_images"]["split"] == "test" and scores["own_images"]["images"] == 5
    assert scores["held_out"]["loss"] > 0
    for place in (folder, folder / "own_images"):
        examples = json.loads((place / "examples.json").read_text())
        assert examples["samples"] and examples["captions"]
        for rows in examples.values():
            assert all(Image.open(place / row["file"]).size == (128, 128) for row in rows)
        assert Image.open(place / "kept.png").width > 128
        assert (place / "reconstruction_pixel_decoder.png").exists()
    edits = json.loads((folder / "edits" / "examples.json").read_text())["edits"]
    assert [len(row["instructions"]) for row in edits] == [1] * 5 + [2] * 2
    assert all(len(row["right"]) == len(row["kinds"]) == len(row["instructions"]) for row in edits)
    assert all(Image.open(folder / "edits" / row["file"]).height == 132 for row in edits)
    outcomes = json.loads((folder / "edits" / "outcomes.json").read_text())
    assert [len(outcomes[name]) for name in ("edit_single", "edit_two_turns")] == [5, 2]
    assert sum(outcomes["edit_single"]) / 5 == scores["edit_single"]
    composed = json.loads((folder / "compositions" / "examples.json").read_text())["compositions"]
    assert [row["prompt"].count("<image>") for row in composed] == [1, 2, 1, 2]
    assert set(scores["composition_by_kind"]) == {"image_text", "image_image", "overall"}
    stories = json.loads((folder / "stories" / "examples.json").read_text())["stories"]
    assert len(stories) == 3 and all(len(row["texts"]) == len(row["marks"]) for row in stories)
    assert all(Image.open(folder / "stories" / row["file"]).height == 132 for row in stories)
    assert scores["edit_single_copied"] == 0 and 0 <= scores["edit_single"] <= 1
    assert json.loads((folder / "done.json").read_text())["seconds"] == scores["evaluation_seconds"]
    for text in (
        "text to image",
        "pixel decoder",
        "own images",
        "of 5 held-out images",
        "held-out loss",
        "source copied",
        "two images",
        "image after an instruction",
    ):
        assert text in output


def test_the_report_builds_without_a_unet(evaluated):
    root, _ = evaluated
    done = command("report", f"--run={root}")
    assert done.returncode == 0, done.stderr
    assert "of 5 held-out images" in done.stdout and f"report: {root}/report.html" in done.stdout
    page = (root / "report.html").read_text()
    assert "U-Net" not in page and "pixel decoder" in page and "5 held-out images" in page
    assert "<h2>Compositions</h2>" in page and "&lt;image&gt; &lt;image&gt;" in page
    assert "<h2>Stories</h2>" in page and "documents continued freely" in page
    assert "<h2>Edits</h2>" in page and page.count("<figure>") > 30 and "two edits, source not read" in page
    assert "held-out " in page and page.count("<svg") >= 8
    assert page.count("<img") == page.count('src="data:image/png;base64,') > 20
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    seconds = json.loads((root / "scores.json").read_text())["seconds"]
    assert "unet_decoder" not in seconds and {"encoder", "records", "stage3", "evaluation"} <= set(seconds)
    times = {name: re.search(rf"<tr><td>{name}</td>(.*?)</tr>", page)[1] for name in ("stage3", "records")}
    spent = [int(cell) for cell in re.findall(r'<td class="n">(\d+)</td>', times["stage3"])]
    assert len(spent) == 1 + len(report_page.SPENT) and abs(spent[0] - sum(spent[1:])) <= 4
    assert len(re.findall(r'<td class="n">\d', times["records"])) == 1


def test_the_report_names_what_is_missing(tmp_path):
    with pytest.raises(DataError, match="run python -m unimm_jax.evaluate"):
        report_page.build(tmp_path)


def test_a_report_escapes_texts_and_says_training_images(evaluated, tmp_path):
    root, _ = evaluated
    scores = json.loads((root / "evaluation" / "scores.json").read_text())["own_images"]
    folder = tmp_path / "copy" / "evaluation"
    folder.mkdir(parents=True)
    for file in (root / "evaluation" / "own_images").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    examples = json.loads((folder / "examples.json").read_text())
    examples["captions"][0]["caption"] = "<script>alert(1)</script>"
    (folder / "examples.json").write_text(json.dumps(examples))
    (folder / "scores.json").write_text(json.dumps(scores | {"split": "train", "evaluation_seconds": 1.0}))
    page = report_page.build(tmp_path / "copy")[0].read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert "captions of 5 training images" in page


def test_own_images_without_held_out_ones_are_said_to_be_training_images(evaluated, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(generation, "BATCH", 4)
    images = tmp_path / "images"
    images.mkdir()
    for i in range(3):
        Image.new("RGB", (64, 64), (80 * i, 0, 0)).save(images / f"{i}.png")
        (images / f"{i}.txt").write_text("a red square")
    options = {"sources": str(images)}
    scores = evaluate(str(evaluated[0] / "stage3"), str(tmp_path / "out"), ["captions"], options)
    assert (scores["split"], scores["images"]) == ("train", 3)  # at the top level
    assert json.loads((tmp_path / "out" / "scores.json").read_text()) == scores
    assert "the scores are of training images" in capsys.readouterr().out


def test_wrong_options_are_named_before_anything_is_written(run, tmp_path):
    stage, out = str(run / "stage3"), tmp_path / "out"
    with pytest.raises(ConfigError, match="no evaluator 'scene'"):
        evaluate(stage, str(out), ["scene"])
    with pytest.raises(ConfigError, match="--batches is an option of none of the evaluators scenes"):
        evaluate(stage, str(out), ["scenes"], {"batches": 3})
    with pytest.raises(ConfigError, match="scenes.prompts is 0"):
        evaluate(stage, str(out), [], {"prompts": 0})
    assert not out.exists()


def test_wrong_checkpoints_end_in_one_line(run, tmp_path):
    done = command("evaluate", f"--checkpoint={run}/tokenizer", f"--output={tmp_path}/out")
    assert done.returncode == 1 and "give one of stage 1, 2 or 3" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match="reads no images"):
        evaluate(str(run / "text"), str(tmp_path / "out"))


def test_imported_models_end_in_one_line(run, tmp_path):
    """The import of LaVIT writes a language stage whose header names no sources; other imports have no objective."""
    meta = read_meta(run / "stage3")
    data = {key: value for key, value in meta["data"].items() if key != "sources"}
    config = {key: value for key, value in json.loads(meta["config"]).items() if key != "objective"}
    params = read_params(run / "stage3")
    for name, changed in (("lavit", {"data": data}), ("language", {"config": json.dumps(config)})):
        checkpoints = Checkpoints(tmp_path / name)
        checkpoints.save(0, {"params": params}, meta | changed | {"step": 0})
        checkpoints.close()
    with pytest.raises(CheckpointError, match="names no data sources .* --evals=scenes"):
        evaluate(str(tmp_path / "lavit"), str(tmp_path / "out"))
    with pytest.raises(CheckpointError, match="imported weights, not a trained stage"):
        evaluate(str(tmp_path / "language"), str(tmp_path / "out"))


TRAINING = """
import pathlib, sys
sys.path.insert(0, "tests")
from helpers import tiny_dict
from unimm_jax import resolve
from unimm_jax.evals import generation
from unimm_jax.train import train

generation.BATCH = 8
config = tiny_dict("stage3", train__steps=3, data__records=sys.argv[2])
config.evals.scenes = dict(type="scenes", every=2, prompts=1, questions=1, images=2)
train(resolve.parse(config), sys.argv[1])
"""


def test_evaluators_run_during_training_on_two_devices(run, tmp_path):
    root = link(run, tmp_path / "run", "tokenizer", "records", "pixel_decoder", "stage2")
    flags = xla_flags(2)
    line = [sys.executable, "-c", TRAINING, str(root / "stage3"), str(run / "records")]
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert "'fsdp': 2" in done.stdout
    rows = metrics.read(root / "stage3", "evals.jsonl")
    assert [(row["step"], row["eval"]) for row in rows] == [(2, "scenes"), (3, "held_out"), (3, "scenes")]
    scores = rows[0]
    assert {"text_to_image/overall", "questions/existence", "reconstruction_by_decoder/pixel_decoder"} <= set(scores)
    assert not {"jitter", "sampling/guidance", "prompts_per_task"} & set(scores)
    assert (root / "stage3" / "images" / "scenes_samples.png").exists()


def test_answers_of_own_conversations_are_scored(evaluated, tmp_path, monkeypatch):
    rows = []
    for i, name in enumerate(("circle", "square", "star")):
        Image.new("RGB", (64, 64), (60 * i, 0, 90)).save(tmp_path / f"{i}.png")
        turns = [("human", "<image>\nwhat is it?"), ("gpt", name), ("human", "how many?"), ("gpt", "One.")]
        rows.append({"image": f"{i}.png", "conversations": [{"from": who, "value": text} for who, text in turns]})
    drawing = [{"from": "human", "value": "draw a circle"}, {"from": "gpt", "value": "<image>"}]
    rows.append({"image": "0.png", "conversations": drawing})
    (tmp_path / "questions.json").write_text(json.dumps(rows))
    asked = []

    def answer(self, prompts, *_):
        asked.extend(prompts)
        return ["Circle", "one", "circle", "two", "star", "one"]

    monkeypatch.setattr("unimm_jax.inference.generator.Generator.continue_with_text", answer)
    options = {"sources": f"llava:{tmp_path / 'questions.json'}", "split": "all"}
    scores = evaluate(str(evaluated[0] / "stage3"), str(tmp_path / "out"), ["answers"], options)
    assert scores["answers"] == {"exact": 4 / 6, "number": 6, "turn_1": 2 / 3, "turn_2": 2 / 3}
    texts = [[segment.text for segment in prompt.document if isinstance(segment, Text)] for prompt in asked]
    assert texts[:2] == [["what is it?"], ["what is it?", "circle", "how many?"]]
    assert all([image.shape for image in prompt.images] == [(64, 64, 3)] for prompt in asked)
    assert "6 answers, all images" in score_table.table(scores)
    shown = json.loads((tmp_path / "out" / "examples.json").read_text())["questions"]
    assert [row["reply"] for row in shown] == ["Circle", "one", "circle", "two", "star", "one"]
