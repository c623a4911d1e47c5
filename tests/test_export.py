"""Exports, opened by PyTorch in processes without JAX."""

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from unimm_jax import export as command
from unimm_jax import import_weights
from unimm_jax.checkpoint import read_params
from unimm_jax.data import scenes
from unimm_jax.generate import Generator, Sampling
from unimm_jax.sharding import flatten

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

QUICKSTART = pathlib.Path(__file__).parent.parent / "runs" / "quickstart"

# Everything that a user without JAX would do, on the inputs of a file; results go to another.
SCRIPT = """
import sys, numpy as np, torch
from transformers import AutoModel, AutoTokenizer
folder, given, found = sys.argv[1:4]
g = np.load(given, allow_pickle=True)
model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
images = torch.tensor(g["images"])
keep, codes = model.tokenize(images)
out = dict(keep=keep.numpy(), codes=codes.numpy())
out["captions"] = np.array(model.describe(images))
out["answers"] = np.array(model.describe(images, ["is there a red circle?"] * len(images)))
for guidance in (1.0, 1.5):
    ids = model.draw_ids(list(g["prompts"]), guidance=guidance, temperature=0)
    drawn, kept = model.codes(ids)
    out[f"drawn_{guidance}"], out[f"drawn_keep_{guidance}"] = drawn.numpy(), kept.numpy()
out["direct"] = model.decode(codes, keep).numpy()
if "noise" in g:
    n = len(g["noise"])
    out["unet"] = model.decode(codes[:n], keep[:n], "unet", torch.tensor(g["noise"])).numpy()
words = AutoTokenizer.from_pretrained(folder)
out["added"] = np.array(words.convert_tokens_to_ids(["[IMG]", "[/IMG]", "<code_0>", "<code_3>"]))
assert "jax" not in sys.modules
np.savez(found, **out)
"""


def compare_in_pytorch(checkpoint, folder, scratch, pictures, prompts):
    """What the exported model does in a process without JAX, against the checkpoint; returns both."""
    g = Generator(checkpoint, batch=8)
    size = g.config.data.image_size
    images = np.stack([scenes.render(scenes.draw_scene(5, "test", i), size) for i in range(pictures)])
    texts = [scenes.draw_prompt(scenes.TASKS[i % 6], 5, i).text for i in range(prompts)]
    given = {"images": images, "prompts": np.array(texts)}
    if "unet" in g.decoders:
        c = g.decoders["unet"][0].config
        side = c.data.image_size // c.loss.unshuffle
        given["noise"] = np.asarray(jax.random.normal(jax.random.key(0), (8, side, side, 3 * c.loss.unshuffle**2)))
    np.savez(scratch / "given.npz", **given)
    arguments = [str(folder), str(scratch / "given.npz"), str(scratch / "found.npz")]
    done = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, cwd=scratch)
    assert done.returncode == 0, done.stderr[-3000:]
    found = np.load(scratch / "found.npz")
    codes, keep = g.tokenize(images)
    assert (found["keep"] == keep).all() and (found["codes"][keep] == codes[keep]).all()
    assert found["captions"].tolist() == g.answer(images, [""] * pictures)
    assert found["answers"].tolist() == g.answer(images, ["is there a red circle?"] * pictures)
    for guidance in (1.0, 1.5):
        ids = g.draw_ids(texts, Sampling(guidance=guidance, temperature=0))
        drawn, kept = g.codes(ids)
        assert (found[f"drawn_keep_{guidance}"] == kept).all() and (found[f"drawn_{guidance}"] == drawn).all()
    difference = lambda a, b: np.abs(a.astype(int) - b.astype(int)).max()
    assert difference(found["direct"], g.decode(codes, keep)) <= 1
    if "unet" in g.decoders:
        assert difference(found["unet"], g.decode(codes[:8], keep[:8], "unet")) <= 1
    v = g.vocabulary
    assert found["added"].tolist() == [v.start, v.end, v.first_code, v.first_code + 3]
    return found


def test_the_whole_model_without_jax(run, tmp_path, capsys):
    lines = command.export(str(run / "stage3"), str(tmp_path / "out"))
    assert float(lines[0].rsplit(" ", 1)[1]) < 1e-4 and "equal" in lines[1]
    compare_in_pytorch(run / "stage3", tmp_path / "out", tmp_path, pictures=10, prompts=6)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "fingerprint" in card and "AutoModel.from_pretrained" in card and "step" in card


@pytest.mark.slow
def test_the_quickstarts_model_without_jax(tmp_path):
    """pytest -m slow tests/test_export.py, after the quickstart: 50 captions, 20 drawings."""
    assert (QUICKSTART / "stage3").exists(), "run bash launch/quickstart.sh first"
    command.export(str(QUICKSTART / "stage3"), str(tmp_path / "out"))
    found = compare_in_pytorch(QUICKSTART / "stage3", tmp_path / "out", tmp_path, pictures=50, prompts=20)
    assert len(set(found["captions"].tolist())) > 10


def test_half_precision_and_what_is_refused(run, tmp_path):
    command.export(str(run / "stage3"), str(tmp_path / "half"), dtype="bfloat16")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert model.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="half exists; give another --output"):
        command.export(str(run / "stage3"), str(tmp_path / "half"))
    with pytest.raises(ValueError, match="holds no language model"):
        command.export(str(run / "tokenizer"), str(tmp_path / "no"))
    with pytest.raises(ValueError, match="LaVIT's layout: its encoder is not EVA-CLIP's.*settings that LaVIT lacks"):
        command.export(str(run / "stage3"), str(tmp_path / "no"), form="lavit")
    with pytest.raises(ValueError, match="--format=onnx is not known"):
        command.export(str(run / "stage3"), str(tmp_path / "no"), form="onnx")
    assert not (tmp_path / "no").exists() and not list(tmp_path.glob(".no.partial*"))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_an_imported_language_model_comes_back(kind, tmp_path):
    from test_import_weights import SCALING, peer_language

    peer = peer_language(kind, scaling=SCALING, words=90)
    peer.save_pretrained(tmp_path / "peer")
    import_weights.import_weights(str(tmp_path / "peer"), str(tmp_path / "one"), codes=32)
    lines = command.export(str(tmp_path / "one"), str(tmp_path / "back"))
    assert float(lines[0].rsplit(" ", 1)[1]) < 1e-4
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert type(back) is type(peer)
    mine, theirs = back.state_dict(), peer.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)
    import_weights.import_weights(str(tmp_path / "back"), str(tmp_path / "two"), codes=32)
    one, two = (dict(flatten(read_params(tmp_path / n))) for n in ("one", "two"))
    assert one.keys() == two.keys() and all(np.array_equal(one[k], two[k]) for k in one)


def lavit_words(folder):
    """A sentencepiece model with fewer words than the tiny model has text rows."""
    import sentencepiece

    sentences = [f"{n} {c} {s}s." for n in ("one", "two") for c in ("red", "blue") for s in ("circle", "star")] * 4
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
    )


def pixel_folders(folder):
    """Tiny U-Nets and autoencoders by `diffusers`, with the widths of the reference's two conditionings."""
    import diffusers
    from test_diffusion_parity import SDXL, randomise
    from test_lavit_parity import C

    pooled = C["unet_dim_2"]
    small = dict(
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,
        transformer_layers_per_block=1,
        norm_num_groups=8,
    )
    xl = dict(cross_attention_dim=C["unet_dim_1"] + pooled, projection_class_embeddings_input_dim=pooled + 6 * 8)
    vae = dict(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
    )
    for name, settings in (
        ("pixel_decoding", small | dict(cross_attention_dim=C["unet_dim"])),
        ("highres_pixel_decoding", SDXL | small | xl),
    ):
        half = lambda module, seed: randomise(module, seed).to(torch.bfloat16)
        half(diffusers.UNet2DConditionModel(**settings), 1).save_pretrained(folder / name / "unet")
        half(diffusers.AutoencoderKL(**vae), 2).save_pretrained(folder / name / "vae")
    empty = torch.randn(1, 5, C["unet_dim"]).to(torch.bfloat16)
    torch.save(empty, folder / "pixel_decoding" / "uncond_embeddings.bin")


def lavit_folder(folder):
    """The reference's tiny weights as its own files."""
    from test_lavit_parity import C, weights

    tensors = lambda source: {k: torch.tensor(v).to(torch.bfloat16) for k, v in source.items()}
    every = weights("visual_tokenizer")
    pick = lambda start: {k.removeprefix(start): v for k, v in every.items() if k.startswith(start)}
    merger = {k: v for k, v in every.items() if k.startswith("causal_encoder.")}
    files = {
        "visual_tokenizer/eva_vitg_psz14.bin": pick("encoder."),
        "visual_tokenizer/tokenizer_encoder.bin": {
            k: v for k, v in every.items() if not k.startswith(("encoder.", "vit_proj."))
        },
        "visual_tokenizer/tokenizer_decoder.bin": weights("tokenizer_decoder"),
        "visual_tokenizer/highres_tokenizer_decoder.bin": weights("highres_tokenizer_decoder"),
        "language_model/visual_weight.bin": merger | {k: v for k, v in every.items() if k.startswith("vit_proj.")},
        "language_model/pytorch_model.bin": weights("llama_model"),
    }
    for name, source in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save(tensors(source), folder / name)
    config = dict(
        model_type="llama",
        vocab_size=102 + C["n_code"],
        hidden_size=C["llm_dim"],
        intermediate_size=C["llm_inter"],
        num_hidden_layers=C["llm_layers"],
        num_attention_heads=C["llm_heads"],
    )
    (folder / "language_model" / "config.json").write_text(json.dumps(config))
    return files


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """LaVIT as it is published, tiny, and the same imported: (folder, names of its files)."""
    folder = tmp_path_factory.mktemp("lavit")
    files = lavit_folder(folder / "published")
    lavit_words(folder / "published" / "language_model")
    pixel_folders(folder / "published")
    import_weights.import_weights(str(folder / "published"), str(folder / "in"))
    return folder, files


LATENT_SCRIPT = """
import sys, numpy as np, torch
from transformers import AutoModel
folder, given, found = sys.argv[1:4]
g = np.load(given)
model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
images = torch.tensor(g["images"])
keep, codes = model.tokenize(images)
out = dict(keep=keep.numpy(), codes=codes.numpy(), captions=np.array(model.describe(images, length=12)))
for name, size in (("unet", (16, 16)), ("unet_high", (32, 16))):
    out[name] = model.decode(codes, keep, name, torch.tensor(g[name]), size=size).numpy()
ids = model.draw_ids(["two red stars."], guidance=4.0, temperature=0)
out["drawn"] = model.codes(ids)[0].numpy()
assert "jax" not in sys.modules
np.savez(found, **out)
"""


@pytest.mark.slow
def test_an_imported_lavit_reads_and_draws_here_and_in_pytorch(published, tmp_path):
    folder, _ = published
    g = Generator(folder / "in" / "language", batch=2, answer_length=12)
    assert g.text.bos is None and g.text.size == 100 > g.text.words  # rows that no word has
    images = np.random.default_rng(0).integers(0, 256, (2, 56, 56, 3), dtype=np.uint8)
    command.export(str(folder / "in" / "language"), str(tmp_path / "hf"), dtype="float32")
    sizes = {"unet": (16, 16), "unet_high": (32, 16)}
    noise = {k: jax.random.normal(jax.random.key(0), (2, h // 2, w // 2, 4)) for k, (h, w) in sizes.items()}
    given = {"images": images} | {k: np.asarray(v) for k, v in noise.items()}
    np.savez(tmp_path / "given.npz", **given)
    arguments = [str(tmp_path / "hf"), str(tmp_path / "given.npz"), str(tmp_path / "found.npz")]
    done = subprocess.run([sys.executable, "-c", LATENT_SCRIPT, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = np.load(tmp_path / "found.npz")
    codes, keep = g.tokenize(images)
    assert (found["keep"] == keep).all() and (found["codes"][keep] == codes[keep]).all()
    assert found["captions"].tolist() == g.answer(images, ["", ""])
    for name, size in sizes.items():
        drawn = g.decode(codes, keep, name, size=size)
        assert drawn.shape == (2, *size, 3)
        gap = np.abs(found[name].astype(int) - drawn.astype(int)).max()
        assert gap <= 1, (name, size, gap)
    assert drawn.std() > 1
    ids = g.draw_ids(["two red stars."], Sampling(guidance=4.0, temperature=0))
    assert (found["drawn"] == g.codes(ids)[0]).all()
    with pytest.raises(ValueError, match="width and height go by 4"):
        g.decode(codes, keep, "unet", size=(22, 16))
    with pytest.raises(ValueError, match="no detokenizer stands beside this model; there is unet, unet_high"):
        g.decode(codes, keep, "detokenizer")


def test_lavits_files_come_in_and_go_out_again(published, tmp_path):
    folder, files = published
    published = folder / "published"
    (tmp_path / "in").symlink_to(folder / "in")
    lines = command.export(str(tmp_path / "in" / "language"), str(tmp_path / "out"), form="lavit")
    assert lines == ["read again: largest difference of a weight 0.0e+00"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "import_weights --source=THIS_DIRECTORY" in card and "AutoModel" not in card and "fingerprint" in card
    import diffusers

    for name in ("pixel_decoding", "highres_pixel_decoding"):
        for kind, part in ((diffusers.UNet2DConditionModel, "unet"), (diffusers.AutoencoderKL, "vae")):
            theirs, mine = (
                kind.from_pretrained(f / name / part, torch_dtype="auto") for f in (published, tmp_path / "out")
            )
            theirs, mine = theirs.state_dict(), mine.state_dict()
            assert theirs.keys() == mine.keys() and all(torch.equal(theirs[k], mine[k]) for k in theirs)
        diffusers.DDIMScheduler.from_pretrained(tmp_path / "out" / name / "scheduler")
    empty = [torch.load(f / "pixel_decoding" / "uncond_embeddings.bin") for f in (published, tmp_path / "out")]
    assert torch.equal(*empty)
    for name in files:
        there = torch.load(published / name, weights_only=True)
        here = torch.load(tmp_path / "out" / name, weights_only=True)
        assert there.keys() == here.keys(), name
        for key in there:
            if not key.startswith(("norm.", "head.")) or "eva" not in name:
                assert torch.equal(there[key], here[key]), (name, key)
    # an encoder of its own has no place in this layout
    import shutil

    from unimm_jax.checkpoint import Checkpoints, read_meta

    shutil.copytree(tmp_path / "in" / "tokenizer", tmp_path / "moved" / "tokenizer")
    params = read_params(tmp_path / "in" / "language")
    params["encoder"]["cls"] = params["encoder"]["cls"] + 1
    checkpoints = Checkpoints(tmp_path / "moved" / "language")
    checkpoints.save(0, {"params": params}, read_meta(tmp_path / "in" / "language"))
    checkpoints.close()
    with pytest.raises(ValueError, match="encoder copy of its own"):
        command.export(str(tmp_path / "moved" / "language"), str(tmp_path / "no"), form="lavit")
