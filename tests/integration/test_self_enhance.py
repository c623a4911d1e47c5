"""The three commands on the tiny stages, then records of the documents, and the evaluator on a real generator."""

import json
import os
import shutil
import sys

import numpy as np
import pytest
from helpers import command, opened, start_processes, tiny_dict, write_drawings

from unimm_jax import resolve
from unimm_jax.data import tasks
from unimm_jax.data.records import Records
from unimm_jax.enhancement import drawings
from unimm_jax.enhancement.drawings import Drawings, DrawingSettings, draw
from unimm_jax.enhancement.verdicts import CORRECTION
from unimm_jax.errors import DataError
from unimm_jax.evals import generation, report_page
from unimm_jax.evals.runner import evaluate
from unimm_jax.inference.generator import Generator
from unimm_jax.inference.loading import load_model
from unimm_jax.inference.sampling import Sampling


@pytest.fixture(scope="module")
def drawn(run, tmp_path_factory):
    """Drawings by the command, assessed and built: (directory, drawings)."""
    root = tmp_path_factory.mktemp("enhanced")
    where = [f"--records={run / 'records'}", f"--output={root / 'drawings'}"]
    done = command(
        "self_enhance", "generate", f"--checkpoint={run / 'stage3'}", *where, "--share=0.3", "--batch_size=16"
    )
    assert done.returncode == 0, done.stderr
    assert "drawings  " in done.stdout and "ETA" in done.stdout and " texts are in " in done.stdout
    return root, Drawings(root / "drawings")


def test_the_commands_give_records_that_stage_3_reads(run, drawn, tmp_path):
    root, found = drawn
    done = command("self_enhance", "assess", f"--drawings={found.path}", "--judge=scenes")
    assert done.returncode == 0, done.stderr
    assert f"verdicts: {len(found)} of {len(found)} drawings" in done.stdout
    built = f"--output={tmp_path / 'built'}"
    done = command("self_enhance", "build", f"--drawings={found.path}", f"--records={run / 'records'}", built)
    assert done.returncode == 0, done.stderr
    sources = f"scenes:count=96;chat:{tmp_path}/built/documents.jsonl"
    done = command(
        "pretokenize", f"--image_tokenizer={run / 'tokenizer'}", f"--text_tokenizer={run / 'stage3'}",
        f"--sources={sources}", f"--output={tmp_path / 'records'}", "--batch_size=32",  # as the records
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    both, before = Records(tmp_path / "records"), Records(run / "records")
    summary = json.loads((tmp_path / "built" / "summary.json").read_text())
    conversations = [i for i in range(len(both)) if both.source[i] == 1]
    assert len(conversations) > 0.7 * summary["assessed"] > 5
    rows = [json.loads(line) for line in (tmp_path / "built" / "documents.jsonl").read_text().splitlines()]
    items = {item.index: item for block in found.complete() for item in found.block(block)}
    corrected = 0
    for i in conversations:
        stored = both[i]
        row = rows[int(stored.key.rpartition("/")[2]) - 1]
        if len(stored.images) == 2:
            corrected += 1
            real = before[items[row["drawing"]].record]
            assert np.array_equal(stored.codes[1], real.codes[0]) and np.array_equal(stored.keep[1], real.keep[0])
            assert CORRECTION in stored.texts
    assert corrected > 5  # the tiny model draws nothing right
    assert tasks.CONVERSATION.applies(both.outline(conversations[0]))
    config = tiny_dict("stage3", data__records=str(tmp_path / "records"), data__seq_len=256, train__steps=1)
    config.data.mixture = tuple(dict(source=s, weight=w) for s, w in zip(sources.split(";"), (0.5, 0.5), strict=True))
    data, _ = opened(resolve.parse(config))
    assert next(data.iterate())


def test_drawings_resume_bitwise_and_know_their_checkpoint(run, drawn, tmp_path, monkeypatch):
    _, found = drawn
    copied = tmp_path / "copy"
    shutil.copytree(found.path, copied)
    shutil.rmtree(copied / "verdicts", ignore_errors=True)
    (copied / "blocks" / "000000.jsonl").unlink()
    settings = DrawingSettings(share=0.3, batch=16)
    draw(str(run / "stage3"), str(run / "records"), str(copied), settings)
    for block in found.complete():
        for item in found.block(block):
            assert (copied / item.image).read_bytes() == found.encoded(item)
    item = found.block(0)[5]
    generator = Generator(load_model(run / "stage3"), 16)
    prompts = [one.prompt for one in found.block(0)]
    images = generator.generate_images(prompts, Sampling(guidance=1.5), item.seed)
    assert np.array_equal(images[5], found.image(item))
    with pytest.raises(DataError, match=r"\(checkpoint differ|\(checkpoint, "):
        draw(str(run / "stage2"), str(run / "records"), str(copied), settings)
    with pytest.raises(DataError, match="none of the .* was chosen; raise --share"):
        draw(str(run / "stage3"), str(run / "records"), str(tmp_path / "none"), DrawingSettings(share=0.0))
    assert drawings.BLOCK == 256 and not (tmp_path / "none").exists()


def test_wrong_commands_end_in_one_line(run, drawn, tmp_path):
    done = command("self_enhance", "judge")
    assert done.returncode == 1 and done.stderr.strip().startswith(
        "error: the first argument is one of generate, assess"
    )
    done = command("self_enhance", "--help")
    assert done.returncode == 0 and "self_enhance assess --drawings" in done.stdout
    done = command("self_enhance", "assess", f"--drawings={tmp_path}", "--judge=scenes")
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1
    assert "has no header.json; draw images with" in done.stderr


OWN_DIRECTORIES = """
import sys
sys.path.insert(0, "tests")
from helpers import write_drawings
from unimm_jax import distributed
from unimm_jax.enhancement.assessing import assess
from unimm_jax.errors import StartupError
from unimm_jax.inference.pretokenization import pretokenize

root = sys.argv[1]
distributed.start()
distributed.PROBE_SECONDS = 0.5
for step in (
    lambda: pretokenize(root + "/tokenizer", root + "/records", "", "", 400, 32),
    lambda: write_drawings(distributed.pathlib.Path(root) / "more"),
    lambda: assess(root + "/drawings", "scenes"),
    lambda: assess(root + "/drawings", "scenes", root + "/verdicts"),
):
    try:
        step()
    except StartupError as error:
        print("caught:", error)
"""


def test_processes_with_directories_of_their_own_stop_at_the_start(tmp_path):
    """As on hosts whose disks are not shared, with copies of the drawings on each."""
    roots = [tmp_path / "host0", tmp_path / "host1"]
    for root in roots:
        write_drawings(root / "drawings", 3)
    processes = start_processes([[sys.executable, "-c", OWN_DIRECTORIES, str(root)] for root in roots])
    said = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    for root, (text, _) in zip(roots, said, strict=True):
        lines = [line for line in text.splitlines() if line.startswith("caught:")]
        flags = (("output", "records"), ("output", "more"), ("drawings", "drawings/verdicts"), ("output", "verdicts"))
        for line, (flag, folder) in zip(lines, flags, strict=True):
            assert f"process 1 of 2 does not see the {flag} {root}/{folder} of process 0" in line
            assert f"Give --{flag} on a disk" in line
    assert not list(tmp_path.rglob("verdicts-*"))


def test_the_evaluator_runs_on_a_trained_model(run, tmp_path, monkeypatch):
    monkeypatch.setattr(generation, "BATCH", 16)
    options = dict(drawings=8, best_of=3)
    scores = evaluate(
        str(run / "stage3"), str(tmp_path / "run" / "evaluation" / "assessments"), ["assessments"], options
    )
    assert 0 <= scores["assessment_agreement"] <= 1 and scores["assessment_drawings"]["wrong"] == 4
    assert set(scores["best_of_4"]) == {"one_sample", "best_of_4", "oracle", "difference", "interval"}
    folder = tmp_path / "run" / "evaluation"
    examples = json.loads((folder / "assessments" / "examples.json").read_text())["assessments"]
    assert examples and all(os.path.exists(folder / "assessments" / row["file"]) for row in examples)
    (folder / "scores.json").write_text(json.dumps(scores))
    page = report_page.build(tmp_path / "run")[0].read_text()
    assert "<h2>Assessments</h2>" in page and "assessments of own images" in page
    assert page.count("<figure>") == len(examples)
