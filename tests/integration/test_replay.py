"""A run with data on disk, repeated: unchanged, and with one pixel, one setting or one version changed."""

import importlib.metadata
import json
import shutil

import numpy as np
import pytest
from helpers import command, tiny
from PIL import Image

from unimm_jax import reproduction, resolve, runcard
from unimm_jax.errors import DataError
from unimm_jax.train import train

STEPS = 4


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(workdir, directory of its images) of a run of `STEPS` steps; tests leave both as they are."""
    root = tmp_path_factory.mktemp("replay")
    (root / "images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(root / "images" / f"{i}.png")
        (root / "images" / f"{i}.txt").write_text(f"image number {i}")
    changes = dict(train__steps=STEPS, train__checkpoint_every=2, optimizer__warmup=0.0)
    train(tiny("encoder", data__sources=str(root / "images"), evals={}, **changes), root / "encoder")
    return root / "encoder", root / "images"


def repeat(workdir, **changes):
    """The comparison of a run with its repetition, with some settings of its saved config changed."""
    config = json.loads(reproduction.saved_config(workdir))
    for name, value in changes.items():
        section, _, setting = name.partition("__")
        config[section][setting] = value
    return reproduction.repeat(workdir, resolve.from_json(json.dumps(config)), 20)


def test_an_unchanged_run_repeats_bitwise(trained):
    found = repeat(trained[0])
    assert found.differences == [] and found.summary == f"{STEPS} steps repeat bitwise"
    card = json.loads((trained[0] / "runcard.json").read_text())
    assert [step["step"] for step in card["steps"]] == list(range(1, STEPS + 1))
    assert card["sessions"][0]["environment"]["jax"] == importlib.metadata.version("jax")
    assert card["config"]["train.steps"] == STEPS and len(card["curve"]) == STEPS
    assert max(map(len, (trained[0] / "runcard.json").read_text().splitlines())) <= 120


def test_one_changed_pixel_is_named_with_its_record(trained):
    workdir, folder = trained
    before = (folder / "3.png").read_bytes()
    pixels = np.array(Image.open(folder / "3.png"))
    pixels[20, 30, 1] ^= 1
    Image.fromarray(pixels).save(folder / "3.png")
    try:
        found = repeat(workdir)
    finally:
        (folder / "3.png").write_bytes(before)
    assert found.differences[0].startswith(f"data: fingerprint of {folder} ")
    examples = [line for line in found.differences if "image" in line and "differs" in line]
    assert examples and all(line.endswith("(key 3.png)") and "differs (images): record" in line for line in examples)
    losses = [line for line in found.differences if "loss" in line]
    assert len(losses) == 1 and losses[0].split(":")[0] == examples[0].split(":")[0]  # at the first step with the image
    assert found.summary == f"the losses differ within {STEPS} steps"


def test_one_changed_setting_is_named(trained):
    found = repeat(trained[0], optimizer__learning_rate=0.005)
    was = json.loads((trained[0] / "config.json").read_text())["optimizer"]["learning_rate"]
    assert found.differences[0] == f"config.optimizer.learning_rate 0.005, was {was}"
    assert any(line.startswith("step 3: loss ") for line in found.differences)  # the rate of the first step is 0
    same = repeat(trained[0], train__keep=5)
    assert same.differences == ["config.train.keep 5, was 2"]
    assert same.summary == f"1 thing differs, but all metrics of {STEPS} steps are equal"


def test_one_changed_version_is_named(trained, monkeypatch):
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "99.1" if name == "pillow" else version(name))
    found = repeat(trained[0])
    assert found.differences == [f"pillow 99.1, was {version('pillow')}"]
    assert found.summary == f"1 thing differs, but all metrics of {STEPS} steps are equal"


def test_a_resumed_run_adds_a_session(trained, tmp_path):
    workdir = tmp_path / "encoder"
    shutil.copytree(trained[0], workdir)
    before = json.loads((workdir / "runcard.json").read_text())
    shutil.rmtree(workdir / "checkpoints" / str(STEPS))  # as if stopped after step 2
    (workdir / "done.json").unlink()
    train(resolve.from_json(reproduction.saved_config(workdir)), workdir)
    after = json.loads((workdir / "runcard.json").read_text())
    assert [session["start"] for session in after["sessions"]] == [0, 2]
    assert after["steps"] == before["steps"] and after["curve"] == before["curve"]
    assert repeat(workdir).summary == f"{STEPS} steps repeat bitwise"
    after["sessions"][1]["changed"] = {"optimizer.learning_rate": 1.0}  # then steps 3 and 4 are of another config
    (workdir / "runcard.json").write_text(json.dumps(after))
    assert repeat(workdir).summary == "2 steps repeat bitwise"
    after["sessions"][0]["start"] = 2
    (workdir / "runcard.json").write_text(json.dumps(after))
    with pytest.raises(DataError, match="lacks the first steps"):
        repeat(workdir)


def test_a_run_that_was_killed_after_its_last_checkpoint_completes_its_card(trained, tmp_path):
    workdir = tmp_path / "encoder"
    shutil.copytree(trained[0], workdir)
    (workdir / "done.json").unlink()
    before = json.loads((workdir / "runcard.json").read_text())
    (workdir / "runcard.json").write_text(json.dumps(before | {"curve": []}))
    train(resolve.from_json(reproduction.saved_config(workdir)), workdir)
    after = json.loads((workdir / "runcard.json").read_text())
    assert after["curve"] == before["curve"]
    assert [session["start"] for session in after["sessions"]] == [0, STEPS]
    assert repeat(workdir).summary == f"{STEPS} steps repeat bitwise"
    train(resolve.from_json(reproduction.saved_config(workdir)), workdir)  # it is finished: nothing is added
    assert json.loads((workdir / "runcard.json").read_text()) == after


def test_missing_data_and_an_output_in_use_are_one_line_with_the_remedy(trained, tmp_path):
    with pytest.raises(DataError, match="holds another run; give another --output"):
        reproduction.repeat(trained[0], tiny("encoder"), 20, str(trained[0]))
    with pytest.raises(DataError, match=r"cannot be repeated: .*/gone.*Restore what is missing, or give its new place"):
        repeat(trained[0], data__sources=str(tmp_path / "gone"))


def test_the_command_prints_lines_and_its_status_says_whether_anything_differs(trained, tmp_path):
    done = command("replay", trained[0], "--steps=2", f"--output={tmp_path / 'again'}")
    assert done.returncode == 0 and done.stdout == "2 steps repeat bitwise\n", done.stdout + done.stderr
    assert len(runcard.read(tmp_path / "again")["steps"]) == 2
    done = command("replay", trained[0], "--steps=1", "--config.optimizer.learning_rate=0.005")
    lines = done.stdout.splitlines()
    assert done.returncode == 1 and lines[0].startswith("config.optimizer.learning_rate 0.005, was "), done.stderr
    assert lines[1:] == ["1 thing differs, but all metrics of 1 step are equal"]
    done = command("replay", tmp_path / "nothing")
    assert done.returncode == 1 and done.stdout == "", done.stderr
    assert "has no config.json; give the workdir of a run" in done.stderr.splitlines()[-1]
