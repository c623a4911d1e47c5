import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from flax import nnx
from helpers import ROOT, TEXT_VOCAB, command, free_port, tiny, xla_flags
from PIL import Image

from unimm_jax import checkpoint, text_tokenizer
from unimm_jax.data import pipeline
from unimm_jax.data.records import RAGGED, Records
from unimm_jax.data.transforms import decode_image
from unimm_jax.errors import CheckpointError, DataError
from unimm_jax.inference import pretokenization
from unimm_jax.inference.generator import Generator
from unimm_jax.inference.loading import load_companions, load_image_tokenizer, load_model
from unimm_jax.models.keys import Keys
from unimm_jax.models.tokenizer import ImageTokenizer

ARGUMENTS = ("", "", TEXT_VOCAB, 32)  # sources as trained on, a text tokenizer of its own, 32 images at a time


def same(a, b, codebook=None):
    """Equal records. With a codebook, another code with nearly the same vector counts as equal.

    A tokenizer that was trained for some steps has such codes, and which of them is nearest depends on the compiled
    program.
    """
    a, b = Records(str(a)), Records(str(b))
    assert len(a) == len(b) > 0 and a.text_tokenizer.payload == b.text_tokenizer.payload
    for i in range(len(a)):
        for name in RAGGED:
            assert (getattr(a, name)[i] == getattr(b, name)[i]).all()
        one, other = a[i], b[i]
        assert one.images == other.images and one.texts == other.texts and one.kinds == other.kinds
        assert np.array_equal(one.keep, other.keep)
        if codebook is None:
            assert np.array_equal(one.codes, other.codes)
        else:
            assert np.abs(codebook[np.array(one.codes)] - codebook[np.array(other.codes)]).max() < 5e-3


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
    (output / "blocks" / "000001.array_record.0a1b").touch()  # by a process that was killed
    again = []

    def counted(self, block, items):
        again.append((self.path.name, block))
        write(self, block, items)

    monkeypatch.setattr(pretokenization.RecordWriter, "write", counted)
    pretokenization.pretokenize(str(run / "tokenizer"), str(output), *ARGUMENTS)
    assert not list(output.glob("blocks/*.array_record.*"))
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
    codebook = checkpoint.read_params(run / "tokenizer")["quantizer"]["codebook"]
    same(tmp_path / "records", run / "records", codebook)


def test_finished_records_are_kept_and_others_refused(run, capsys):
    pretokenization.pretokenize(str(run / "tokenizer"), str(run / "records"), *ARGUMENTS)
    assert "already in" in capsys.readouterr().out
    with pytest.raises(DataError, match="another tokenizer or of other data"):
        pretokenization.pretokenize(str(run / "tokenizer"), str(run / "records"), "scenes:count=5", *ARGUMENTS[1:])


# ---- Records of more sources -----------------------------------------------------------------------------------------


def test_blocks_of_the_same_sources_are_copied(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pretokenization, "BLOCK", 20)
    old, more = "scenes:count=50", "scenes:count=50;scenes:count=30,seed=1"
    pretokenization.pretokenize(str(run / "tokenizer"), str(tmp_path / "old"), old, *ARGUMENTS[1:])
    words = (str(tmp_path / "words.json"), *ARGUMENTS[2:])
    (tmp_path / "words.json").write_text(Records(tmp_path / "old").text_tokenizer.payload["model"])
    pretokenization.pretokenize(str(run / "tokenizer"), str(tmp_path / "anew"), more, *words)
    write, written = pretokenization.RecordWriter.write, []

    def counted(self, block, items):
        written.append((self.path.name, block))
        write(self, block, items)

    monkeypatch.setattr(pretokenization.RecordWriter, "write", counted)
    capsys.readouterr()
    arguments = (str(run / "tokenizer"), str(tmp_path / "new"), more, *ARGUMENTS[1:], str(tmp_path / "old"))
    pretokenization.pretokenize(*arguments)
    # the third block holds the last 10 records of the old source and the first 10 of the new one
    assert [block for name, block in written if name == "new"] == [2, 3]
    assert f"records: 40 of 80 are copied from {tmp_path / 'old'}" in capsys.readouterr().out
    for name in ("header.json", "blocks/000000.array_record", "blocks/000002.npz", "test/header.json"):
        assert (tmp_path / "new" / name).read_bytes() == (tmp_path / "anew" / name).read_bytes(), name


def test_records_that_cannot_be_copied_are_refused(run, tmp_path, monkeypatch):
    monkeypatch.setattr(pretokenization, "BLOCK", 20)
    old, output = tmp_path / "old", tmp_path / "new"
    pretokenization.pretokenize(str(run / "tokenizer"), str(old), "scenes:count=50", *ARGUMENTS[1:])

    def refused(match, sources="scenes:count=50;scenes:count=30,seed=1", words="", reuse=old):
        with pytest.raises(DataError, match=match):
            pretokenization.pretokenize(str(run / "tokenizer"), str(output), sources, words, *ARGUMENTS[2:], str(reuse))
        assert not (output / "header.json").exists()

    refused("begin with other data; name their sources first", "scenes:count=30,seed=1;scenes:count=50")
    (tmp_path / "words.json").write_text(text_tokenizer.train(["other words"] * 9, 300).payload["model"])
    refused("another text tokenizer; leave out --text_tokenizer", words=str(tmp_path / "words.json"))
    refused("holds no finished records", reuse=tmp_path / "nothing")
    header = json.loads((old / "header.json").read_text())
    (old / "header.json").write_text(json.dumps(header | {"block": 4096}))
    refused("of an earlier version")
    (old / "header.json").write_text(json.dumps(header | {"fingerprint": "0"}))
    refused("another image tokenizer")
    (old / "header.json").write_text(json.dumps(header))
    block = old / "blocks" / "000001.array_record"
    block.write_bytes(block.read_bytes()[:-1] + b"x")
    refused("block 1 of the records in .* is damaged or missing; leave out --reuse")
    block.with_suffix(".npz").write_bytes(b"")
    refused("block 1 of the records in .* is damaged or missing")
    for name in ("sizes", "sizes_ends"):
        (old / "index" / f"{name}.npy").unlink()
    refused("of an earlier version")


# ---- Sampled masks ---------------------------------------------------------------------------------------------------


def _with_selection(tokenizer, selection, keep_probability=None, **changes):
    """The tokenizer with another selection, and with one keep probability for every patch if given."""
    config, params = tokenizer.config, tokenizer.params
    section = dataclasses.replace(config.model["image_tokenizer"], selection=selection)
    config = dataclasses.replace(config, model=config.model | {"image_tokenizer": section}, **changes)
    if keep_probability is not None:
        last = params["selector"]["out3"]
        bias = np.log([keep_probability, 1 - keep_probability]).astype(np.float32)
        params = params | {"selector": params["selector"] | {"out3": {"kernel": last["kernel"] * 0, "bias": bias}}}
    model = nnx.eval_shape(lambda: ImageTokenizer(config.model["encoder"], section, rngs=Keys(params=0)))
    return dataclasses.replace(tokenizer, config=config, graph=nnx.graphdef(model), params=params)


def test_sampled_masks_are_the_same_in_every_batch_and_in_generation(run, tmp_path):
    tokenizer = _with_selection(load_image_tokenizer(run / "tokenizer"), "sample", 0.4)
    dataset = pipeline.open_images(tokenizer.config.data, "train", ())[0]
    words = Records(run / "records").text_tokenizer
    for batch in (32, 7):
        encoder = pretokenization.Encoder(tokenizer, batch)
        pretokenization.write_split(encoder, {0: dataset}, tmp_path / f"{batch}", words, "scenes")
    same(tmp_path / "32", tmp_path / "7")
    records = Records(tmp_path / "32")
    assert 0.3 < records.kept.values.mean() / 16 < 0.5 and len(set(records.kept.values.tolist())) > 3
    model = load_model(run / "stage3")
    generator = Generator(model, batch=5, companions=(tokenizer, load_companions(model)[1]))
    images = np.stack([records.image(i) for i in range(12)])
    codes, keep = generator.tokenize(images)
    for i in range(12):
        assert np.array_equal(keep[i], records[i].keep[0])


def test_cropped_images_have_the_same_codes_in_records_and_in_generation(run, tmp_path):
    tokenizer = load_image_tokenizer(run / "tokenizer")
    data = dataclasses.replace(tokenizer.config.data, fit="crop", max_crop=0.3, image_size=64)
    tokenizer = dataclasses.replace(tokenizer, config=dataclasses.replace(tokenizer.config, data=data))
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i, size in enumerate([(64, 80), (90, 70), (64, 64), (64, 128)]):
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(tmp_path / "images" / f"{i}.png")
        (tmp_path / "images" / f"{i}.txt").write_text(f"image number {i}")
    dataset = pipeline.open_images(dataclasses.replace(data, sources=f"folder:{tmp_path / 'images'}", held_out=0.0))[0]
    words = Records(run / "records").text_tokenizer
    encoder = pretokenization.Encoder(tokenizer, 4)
    counts = pretokenization.write_split(encoder, {0: dataset}, tmp_path / "records", words, "folder")
    assert counts[:2] == (3, 1)  # half of the last one would be cut
    records = Records(tmp_path / "records")
    assert records.fit == "crop"
    model = load_model(run / "stage3")
    header = model.header | {"fit": records.fit}
    companions = (tokenizer, load_companions(model)[1])
    generator = Generator(dataclasses.replace(model, header=header), batch=4, companions=companions)
    files = [records[i].images[0] for i in range(3)]
    assert all(np.array_equal(generator.read_image(file), records.image(i)) for i, file in enumerate(files))
    codes, keep = generator.tokenize([np.asarray(decode_image(file)) for file in files])
    for i in range(3):
        assert np.array_equal(keep[i], records[i].keep[0]) and np.array_equal(
            codes[i][keep[i]], records[i].codes[0][keep[i]]
        )


def test_an_argmax_rate_off_the_target_is_reported_at_the_end(run, tmp_path, monkeypatch, capsys):
    tokenizer = load_image_tokenizer(run / "tokenizer")
    selector = tiny("selector").loss.keep_rate
    assert pretokenization.target_keep_rate(tokenizer.config, run / "tokenizer") == selector[-1]
    assert pretokenization.target_keep_rate(tokenizer.config, shutil.copytree(run / "tokenizer", tmp_path / "x")) == 0
    for selection, warns in (("argmax", True), ("sample", False)):
        changed = _with_selection(tokenizer, selection, 1 / 3, init_from=())  # its own target is 1/3
        assert math.isclose(changed.config.loss.keep_rate[-1], 1 / 3)
        monkeypatch.setattr(pretokenization, "load_image_tokenizer", lambda path, changed=changed: changed)
        pretokenization.pretokenize(str(run / "tokenizer"), str(tmp_path / selection), *ARGUMENTS)
        printed = capsys.readouterr().out.splitlines()
        text = "records: warning: the selector keeps 6.2% of the patches, its target is 33.3%"
        assert any(line.startswith(text) for line in printed) == warns
        assert sum("warning" in line for line in printed) == warns


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


@pytest.mark.parametrize("name", ["index/sizes_ends.npy", "index/kept.npy", "blocks/000000.array_record"])
def test_a_missing_file_of_records_is_named(run, tmp_path, name):
    shutil.copytree(run / "records", tmp_path / "records")
    (tmp_path / "records" / name).unlink()
    with pytest.raises(DataError, match=name.split("/")[-1]):
        Records(tmp_path / "records")[0]


def test_finished_records_of_images_that_changed_are_refused(run, tmp_path):
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
