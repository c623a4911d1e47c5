"""ILLUME's recipe at the tiny scale, with SimVQ: a bidirectional tokenizer, an MLP connector, no selector."""

import numpy as np
import pytest
from helpers import TEXT_VOCAB, link, tiny

from unimm_jax import metrics
from unimm_jax.checkpoint import read_params
from unimm_jax.data import scenes
from unimm_jax.data.records import Records
from unimm_jax.inference.generator import Generator
from unimm_jax.inference.loading import load_model
from unimm_jax.inference.pretokenization import pretokenize
from unimm_jax.inference.sampling import Sampling
from unimm_jax.interop.exporter import export
from unimm_jax.sharding import flatten
from unimm_jax.train import train

VARIANT = "laptop-illume"
SIMVQ = dict(model__image_tokenizer__quantizer="simvq")


@pytest.fixture(scope="module")
def stages(run, tmp_path_factory):
    """Its stages up to stage 1; encoder and text are those of the other tests."""
    root = link(run, tmp_path_factory.mktemp("illume"), "encoder", "text")
    train(tiny("tokenizer", VARIANT, train__steps=12, loss__restart_below=0.0, **SIMVQ), root / "tokenizer")
    pretokenize(str(root / "tokenizer"), str(root / "records"), "", "", TEXT_VOCAB, 32)
    for stage in ("pixel_decoder", "stage1"):
        train(tiny(stage, VARIANT, train__steps=3, evals={}, **SIMVQ), root / stage)
    return root


def test_the_tokenizer_learns_and_keeps_all_patches(stages):
    rows = metrics.read(stages / "tokenizer")
    assert rows[-1]["loss"] < 0.97 * rows[0]["loss"]
    params = dict(flatten(read_params(stages / "tokenizer")))
    assert {path.split("/")[0] for path in params} == {"encoder", "feature_encoder", "quantizer", "decoder"}
    assert not np.allclose(params["quantizer/code_map/kernel"], np.eye(8))
    records = Records(stages / "records")
    assert records.header["selection"] == "all" and (records.kept.values == 16).all()


def test_generated_images_have_all_codes(stages):
    g = Generator(load_model(stages / "stage1"), batch=2)
    ids = g.generate_image_tokens(["a red circle", "two crosses"], Sampling(guidance=1.5))
    codes, keep = g.codes(ids)
    assert keep.all() and g.vocabulary.num_position_ids == 0
    assert g.decode(codes, keep).shape == (2, 64, 64, 3)


def test_the_exported_model_gives_the_same_codes_and_images(stages, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    export(str(stages / "stage1"), str(tmp_path / "out"), verify=False)
    model = transformers.AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True, dtype=torch.float32)
    g = Generator(load_model(stages / "stage1"), batch=4)
    images = np.stack([scenes.render(scenes.draw_scene(5, "test", i), 64) for i in range(4)])
    codes, keep = g.tokenize(images)
    found_keep, found_codes = model.tokenize(torch.tensor(images))
    ours = torch.tensor(codes.astype(np.int64))
    vectors = model.image_tokenizer.quantizer.vectors  # of two nearly equal ones, each library may take another
    assert np.array_equal(found_keep, keep) and (vectors[found_codes] - vectors[ours]).abs().max() < 5e-3
    decoded = model.decode(ours, found_keep).numpy()
    assert np.abs(decoded.astype(int) - g.decode(codes, keep)).max() <= 1
