import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT, TEXT_VOCAB, command, free_port, tiny, xla_flags

from unimm_jax.data import pipeline
from unimm_jax.data.records import RAGGED, Records
from unimm_jax.errors import CheckpointError, DataError
from unimm_jax.inference import pretokenization

ARGUMENTS = ("", "", TEXT_VOCAB, 32)  # sources as trained on, a text tokenizer of its own, 32 images at a time


def same(a, b):
    a, b = Records(str(a)), Records(str(b))
    assert len(a) == len(b) > 0 and a.text_tokenizer.payload == b.text_tokenizer.payload
    for i in range(len(a)):
        for name in RAGGED:
            assert (getattr(a, name)[i] == getattr(b, name)[i]).all()
        one, other = a[i], b[i]
        assert one.images == other.images and one.texts == other.texts and one.kinds == other.kinds
        assert np.array_equal(one.keep, other.keep) and np.array_equal(one.codes, other.codes)


def test_an_interrupted_run_resumes_with_the_missing_blocks(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pretokenization, "BLOCK", 40)
    output, write, written = tmp_path / "records", pretokenization.RecordWriter.write, []

    def stumble(self, block, items):
        if self.path.name == "test":
            return write(self, block, items)
        if len(written) == 1:
            next(iter(items))
            raise KeyboardInterrupt
        write(self, block, items)
        written.append(block)

    monkeypatch.setattr(pretokenization.RecordWriter, "write", stumble)
    with pytest.raises(KeyboardInterrupt):
        pretokenization.pretokenize(str(run / "tokenizer"), str(output), *ARGUMENTS)
    assert written == [0] and not (output / "header.json").exists()
    with pytest.raises(DataError, match="no finished records"):
        Records(str(output))
    with pytest.raises(DataError, match="unfinished records of another tokenizer or other data"):
        pretokenization.pretokenize(str(run / "tokenizer"), str(output), "scenes:count=50", *ARGUMENTS[1:])
    again = []

    def counted(self, block, items):
        again.append((self.path.name, block))
        write(self, block, items)

    monkeypatch.setattr(pretokenization.RecordWriter, "write", counted)
    pretokenization.pretokenize(str(run / "tokenizer"), str(output), *ARGUMENTS)
    assert again == [("records", 1), ("records", 2)] and "96 written" in capsys.readouterr().out
    same(output, run / "records")
    same(output / "test", run / "records" / "test")


SCRIPT = """
import sys
from unimm_jax import distributed
from unimm_jax.inference import pretokenization
pretokenization.BLOCK = 20
distributed.start()
pretokenization.pretokenize(sys.argv[1], sys.argv[2], "", "", 400, 32)
"""


def test_two_processes_share_the_blocks(run, tmp_path):
    """Each on two fake devices."""
    address, processes = f"127.0.0.1:{free_port()}", []
    for index in range(2):
        env = os.environ | {
            "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": xla_flags(2),
            "JAX_PLATFORMS": "cpu",
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(index),
        }
        arguments = [sys.executable, "-c", SCRIPT, str(run / "tokenizer"), str(tmp_path / "records")]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        processes.append(subprocess.Popen(arguments, cwd=ROOT, env=env, **pipes))
    said = [p.communicate(timeout=200)[0] for p in processes]
    assert [p.returncode for p in processes] == [0, 0], "\n".join(text[-3000:] for text in said)
    assert json.loads((tmp_path / "records" / "header.json").read_text())["blocks"] == 5
    assert sum("96 written" in text for text in said) == 1
    same(tmp_path / "records", run / "records")


def test_finished_records_are_kept_and_others_refused(run, capsys):
    pretokenization.pretokenize(str(run / "tokenizer"), str(run / "records"), *ARGUMENTS)
    assert "already in" in capsys.readouterr().out
    with pytest.raises(DataError, match="another tokenizer or of other data"):
        pretokenization.pretokenize(str(run / "tokenizer"), str(run / "records"), "scenes:count=5", *ARGUMENTS[1:])


def test_a_checkpoint_of_another_stage_is_refused_in_one_line(run, tmp_path):
    with pytest.raises(CheckpointError, match="selector:laptop; give the workdir of the stage tokenizer"):
        pretokenization.pretokenize(str(run / "selector"), str(tmp_path / "records"), *ARGUMENTS)
    done = command("pretokenize", f"--image_tokenizer={run / 'encoder'}", f"--output={tmp_path / 'records'}")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "give the workdir of the stage tokenizer" in done.stderr.splitlines()[-1]


def test_damaged_records_are_one_sentence(run, tmp_path):
    for name, content in (("header.json", b"{"), ("header.json", b"[]"), ("index/texts.npy", b"nothing")):
        shutil.rmtree(tmp_path / "records", ignore_errors=True)
        shutil.copytree(run / "records", tmp_path / "records")
        (tmp_path / "records" / name).write_bytes(content)
        with pytest.raises(DataError, match="are damaged"):
            Records(tmp_path / "records")


def test_finished_records_of_images_that_changed_are_refused(run, tmp_path):
    from PIL import Image

    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(6):
        Image.new("RGB", (64, 64), (30 * i, 10, 10)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"image number {i}")
    arguments = (str(run / "tokenizer"), str(tmp_path / "records"), str(folder), *ARGUMENTS[1:])
    pretokenization.pretokenize(*arguments)
    (folder / "3.txt").write_text("image number 4")
    with pytest.raises(DataError, match="another tokenizer or of other data"):
        pretokenization.pretokenize(*arguments)


def test_sources_keep_their_numbers_where_one_has_no_held_out_records(run, tmp_path):
    from PIL import Image

    (tmp_path / "few").mkdir()
    for i in range(2):
        Image.new("RGB", (64, 64), (40 * i, 0, 0)).save(tmp_path / "few" / f"{i}.png")
        (tmp_path / "few" / f"{i}.txt").write_text("a dark image")
    (tmp_path / "texts.jsonl").write_text("".join(f'{{"text": "sentence {i}"}}\n' for i in range(3)))
    sources = f"{tmp_path / 'few'};scenes:count=6;text:{tmp_path / 'texts.jsonl'}"
    pretokenization.pretokenize(str(run / "tokenizer"), str(tmp_path / "records"), sources, *ARGUMENTS[1:])
    records, held_out = Records(tmp_path / "records"), Records(tmp_path / "records" / "test")
    assert np.bincount(records.source).tolist() == [2, 6, 3] and records.num_images == 8
    assert set(held_out.source) == {1}
    mixture = (dict(source="scenes:count=6"), dict(source=f"text:{tmp_path / 'texts.jsonl'}", tasks=dict(text=1.0)))
    config = tiny("stage2", data__records=str(tmp_path / "records"), data__mixture=mixture)
    for split, expected in (("train", {1, 2}), ("test", {1})):
        plan = pipeline.packed_input(config, split).rows.plan
        assert set(plan.records.source[plan.first_window().drawn.records]) == expected
