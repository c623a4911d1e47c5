import importlib
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, tiny

from configs import common
from unimm_jax import config as config_lib


def _main(*arguments, **env):
    command = [sys.executable, "-m", "unimm_jax.main", *arguments]
    env = {k: v for k, v in os.environ.items() if k != "UNIMM_TRACEBACK"} | env
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)


def test_the_published_size_says_what_it_needs_and_what_to_do(tmp_path):
    done = _main("--config=configs/stage2.py", f"--workdir={tmp_path / 'x'}")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    for part in ("stage2:7b needs", "GiB", "this machine has", "configs/stage2.py:laptop"):
        assert part in lines[0]
    assert not (tmp_path / "x").exists()


def test_every_mistake_of_a_config_is_said_at_once(tmp_path):
    config = tiny("stage3", train__steps=0, dtype="float8", data__image_size=60)
    config.data.tasks = dict(cation=1.0)
    config.optimizer.rules = [("(", 1.0)]
    with pytest.raises(config_lib.ConfigError) as error:
        config_lib.check(config, tmp_path / "stage3")
    message = str(error.value)
    for part in ("train.steps is 0", "float8", "cation", "regular expression", "patch size", "pretokenize", "stage2"):
        assert part in message
    assert message.count("\n- ") + 1 >= 7


@pytest.mark.parametrize("size", common.SIZES)
def test_every_config_of_every_size_is_sound(size, tmp_path):
    """What is left to complain of is what earlier stages have not made yet."""
    stages = [p.stem for p in (ROOT / "configs").glob("*.py") if p.stem not in ("__init__", "common")]
    assert len(stages) >= 9
    for stage in stages:
        config = importlib.import_module(f"configs.{stage}").get_config(size)
        try:
            config_lib.check(config, tmp_path / stage)
        except config_lib.ConfigError as error:
            lines = str(error).splitlines()
            assert all("run python -m unimm_jax.pretokenize" in x or "train that stage" in x for x in lines), lines


def test_unknown_sizes_and_flags_are_named(tmp_path):
    done = _main("--config=configs/stage2.py:tabletop", f"--workdir={tmp_path}")
    assert done.returncode and "tabletop" in done.stderr and "laptop" in done.stderr
    done = _main("--config=configs/stage2.py:laptop", f"--workdir={tmp_path}", "--config.train.stepz=3")
    assert done.returncode and "stepz" in done.stderr


def test_missing_sources_stop_with_one_sentence(tmp_path):
    missing = tmp_path / "nothing"
    done = _main(
        "--config=configs/encoder.py:laptop", f"--workdir={tmp_path / 'e'}", f"--config.data.sources={missing}"
    )
    assert done.returncode == 1
    assert "neither 'scenes' nor an existing folder" in done.stderr and "Traceback" not in done.stderr


def test_evaluation_and_report_of_a_run(run):
    from unimm_jax import evaluate, report

    scores = evaluate.evaluate(str(run / "stage3"), str(run / "evaluation"), 3, 4, 16)
    assert set(scores["text_to_image"]) >= {"single_object", "position", "overall"}
    assert set(scores["questions"]) == {"existence", "count", "colour", "shape", "position", "overall"}
    assert set(scores["reconstruction_by_decoder"]) == {"detokenizer", "unet"}
    page = report.build(run)
    text = page.read_text()
    for part in ("colour attribution", "data:image/png;base64", "<svg", "jax ", "Questions", "selector"):
        assert part in text
    assert 'src="http' not in text
    written = json.loads((run / "scores.json").read_text())
    assert {"text_to_image", "questions", "caption", "reconstruction", "tokens_per_image", "seconds"} <= written.keys()
    assert written["seconds"].keys() >= {"encoder", "records", "stage3", "evaluation"}
    assert "strict" in evaluate.table(written)


def test_pretokenize_keeps_finished_records_and_refuses_others(run, capsys):
    from unimm_jax.pretokenize import pretokenize

    pretokenize(str(run / "tokenizer"), str(run / "records"), "", "", 400, 32)
    assert "already in" in capsys.readouterr().out
    with pytest.raises(ValueError, match="another tokenizer or of other data"):
        pretokenize(str(run / "tokenizer"), str(run / "records"), "scenes:count=5", "", 400, 32)
