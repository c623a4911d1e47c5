"""Checkpoints and records of format 1 (before names and configs changed) load, generate and resume.

`tests/data/format1.tar.xz` was written by version 0.1.0: tiny stages of two steps, and what that version generated from
them and logged when it resumed one of them.
"""

import dataclasses
import tarfile

import numpy as np
import pytest
from helpers import ROOT

from unimm_jax import legacy, metrics, resolve
from unimm_jax.checkpoint import Stored, read_meta
from unimm_jax.data.records import Records
from unimm_jax.inference.generator import Generator
from unimm_jax.inference.loading import load_model
from unimm_jax.inference.sampling import Sampling
from unimm_jax.train import train


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    root = tmp_path_factory.mktemp("format1")
    with tarfile.open(ROOT / "tests" / "data" / "format1.tar.xz") as archive:
        archive.extractall(root, filter="data")
    return root


def test_an_old_model_generates_what_it_did(old):
    expected = np.load(old / "expected.npz")
    generator = Generator(load_model(old / "stage2"), batch=2)
    prompts = ["a red circle", "two crosses"]
    ids = generator.generate_image_tokens(prompts, Sampling(guidance=2.0, temperature=0))
    assert np.array_equal(ids, expected["ids"])
    images = generator.decode(*generator.codes(ids))
    assert np.abs(images.astype(int) - expected["images"]).max() <= 1


def test_old_records_read_under_todays_names(old):
    records = Records(old / "records")
    item, outline = records[3], records.outline(3)
    assert records.header["num_patches"] == 16 and item.keep[0].sum() == records.kept[3][0]
    assert isinstance(item.images[0], bytes) and records.image(3).shape == (64, 64, 3)
    assert len(outline.captions) == 1 and outline.questions[1][2] and item.kinds[:2] == ["existence", "existence"]
    index = range(1 + max(answer for _, answer, _ in outline.questions))
    assert len(item.texts) == len(records.texts[3]) == len(index)
    counted = [len(records.text_tokenizer.encode(text)) for text in item.texts]
    for question, answer, _ in outline.questions:  # format 1 counted both together
        assert records.texts[3][[question, answer]].sum() == counted[question] + counted[answer]
    assert [records.texts[3][i] for i in outline.captions + outline.prompts] == [
        counted[i] for i in outline.captions + outline.prompts
    ]


def test_an_old_run_resumes_as_it_did(old):
    """Parameters that changed their names, in the parameters and in the optimizer state."""
    assert read_meta(old / "pixel_decoder").get("format", 1) == 1
    names = {name.split("/")[0] for name in Stored(old / "pixel_decoder").shapes}
    assert names == {"pixel_decoder", "image_tokenizer"}
    config = resolve.from_json(read_meta(old / "pixel_decoder")["config"])
    assert ("pixel_decoder/.*", 1.0) in config.optimizer.rules
    config = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, steps=4),
        data=dataclasses.replace(config.data, records=str(old / "records")),
    )
    train(config, old / "pixel_decoder")
    found = [row["loss"] for row in metrics.read(old / "pixel_decoder")]
    assert np.allclose(found, np.load(old / "expected.npz")["resumed"], rtol=1e-4)
    assert read_meta(old / "pixel_decoder")["format"] == legacy.FORMAT
