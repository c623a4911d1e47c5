import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from test_distributed import free_port

from unimm_jax import pretokenize as command
from unimm_jax.data.packing import Records

ARGUMENTS = ("", "", 400, 32)  # sources as trained on, a text tokenizer of its own, 32 pictures at a time


def same(a, b):
    a, b = Records(str(a)), Records(str(b))
    assert len(a) == len(b) > 0 and a.tokenizer.payload == b.tokenizer.payload and (a.kept == b.kept).all()
    for i in range(len(a)):
        assert (a.captions[i] == b.captions[i]).all() and (a.questions[i] == b.questions[i]).all()
        one, other = a[i], b[i]
        assert one["picture"] == other["picture"] and one["captions"] == other["captions"]
        assert (one["keep"] == other["keep"]).all() and (one["codes"] == other["codes"]).all()


def test_an_interrupted_run_goes_on_with_what_is_missing(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "BLOCK", 40)
    output, write, written = tmp_path / "records", command.RecordWriter.write, []

    def stumble(self, block, items):
        if len(written) == 1:
            next(iter(items))
            raise KeyboardInterrupt
        write(self, block, items)
        written.append(block)

    monkeypatch.setattr(command.RecordWriter, "write", stumble)
    with pytest.raises(KeyboardInterrupt):
        command.pretokenize(str(run / "tokenizer"), str(output), *ARGUMENTS)
    assert written == [0] and not (output / "header.json").exists()
    with pytest.raises(ValueError, match="no finished records"):
        Records(str(output))
    with pytest.raises(ValueError, match="unfinished records of another tokenizer or of other data"):
        command.pretokenize(str(run / "tokenizer"), str(output), "scenes:count=50", *ARGUMENTS[1:])
    again = []
    monkeypatch.setattr(command.RecordWriter, "write", lambda self, b, items: (again.append(b), write(self, b, items)))
    command.pretokenize(str(run / "tokenizer"), str(output), *ARGUMENTS)
    assert again == [1, 2] and "96 written" in capsys.readouterr().out
    same(output, run / "records")


def test_records_of_another_version_are_refused(run, tmp_path):
    shutil.copytree(run / "records", tmp_path / "old")
    arrays = dict(np.load(tmp_path / "old" / "index.npz"))
    arrays.pop("caption_counts")
    np.savez(tmp_path / "old" / "index.npz", **arrays)
    with pytest.raises(ValueError, match="lacks caption_counts: another version .* write them anew"):
        Records(str(tmp_path / "old"))


SCRIPT = """
import sys
from unimm_jax import distributed, pretokenize
pretokenize.BLOCK = 20
distributed.start()
pretokenize.pretokenize(sys.argv[1], sys.argv[2], "", "", 400, 32)
"""


def test_two_processes_share_the_blocks(run, tmp_path):
    """Each on two fake devices."""
    address, processes = f"127.0.0.1:{free_port()}", []
    for index in range(2):
        env = os.environ | {
            "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
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
    assert np.array_equal(Records(str(tmp_path / "records")).kept, Records(str(run / "records")).kept)
