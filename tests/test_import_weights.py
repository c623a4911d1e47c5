"""Published weights in: models that `transformers` itself makes, LaVIT's layout, and every bad input by its message."""

import json
import pickle
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unimm_jax import import_weights as command
from unimm_jax.checkpoint import read_meta, read_params
from unimm_jax.interop import lavit, llama, vision
from unimm_jax.interop.files import BadFile, Tensors, write_safetensors
from unimm_jax.interop.table import foreign_shapes, to_theirs
from unimm_jax.models.language import LanguageConfig, LanguageModel
from unimm_jax.models.vit import ViT, ViTConfig
from unimm_jax.sharding import flatten

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def exact():
    with jax.default_matmul_precision("highest"):
        yield


def gap(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.abs(a - b).max() / max(1.0, np.abs(b).max())


def randomise(module, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return module.eval()


# ---- Language models -------------------------------------------------------------------------------------------------


def peer_language(kind, heads=4, groups=2, tied=False, biases=False, scaling=None, words=101, layers=2):
    common = dict(
        vocab_size=words,
        hidden_size=8 * heads,
        intermediate_size=40,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // groups,
        tie_word_embeddings=tied,
        max_position_embeddings=256,
        pad_token_id=None,
    )
    theta = {"rope_theta": 5000.0}
    rope = dict(theta, rope_type="default") if scaling is None else dict(theta, rope_type="llama3", **scaling)
    if kind == "llama":
        common |= dict(attention_bias=biases, mlp_bias=biases)
    if kind == "qwen3":
        common |= dict(head_dim=16)
    config = transformers.AutoConfig.for_model(kind, **common, rope_parameters=rope)
    return randomise(transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager"))


def check_language(peer, folder):
    """Saved by transformers, imported here: equal logits; exported through the table: equal tensors."""
    peer.save_pretrained(folder)
    importer, model = command.import_language(folder, codes=32)
    params = importer.load()
    config = LanguageConfig(**model["language"], scan=False)
    words = peer.config.vocab_size
    rows = params["language"]["embed_visual"].shape[0]
    abstract = nnx.eval_shape(lambda: LanguageModel(config, words, rows, rngs=nnx.Rngs(params=0)))
    ours = nnx.merge(nnx.graphdef(abstract), params["language"])
    ids = np.random.default_rng(0).integers(0, words, (2, 23))
    places = jnp.broadcast_to(jnp.arange(23), ids.shape)
    hidden = ours(ours.embed(jnp.asarray(ids)), places, jnp.ones_like(places))
    with torch.no_grad():
        wanted = peer(torch.tensor(ids)).logits.numpy()
    assert gap(hidden @ ours.head().T[:, :words], wanted) < 1e-4
    flat = dict(flatten(params))
    source = {k: v.numpy() for k, v in peer.state_dict().items()}
    table = llama.language(config, words, 0)
    for name, array in to_theirs(table, flat.__getitem__, foreign_shapes(table, importer.shapes)):
        assert np.array_equal(array, source[name]), name
    return params


SCALING = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)


@pytest.mark.parametrize(
    "kind, options",
    [
        ("llama", {}),
        ("llama", dict(tied=True, groups=4)),  # SmolLM2's shape
        ("llama", dict(scaling=SCALING, words=128)),  # LLaMA 3.1
        ("qwen2", dict(tied=True)),
        ("qwen3", dict(groups=1)),
    ],
)
def test_language_families(kind, options, tmp_path):
    check_language(peer_language(kind, **options), tmp_path)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(["llama", "qwen2", "qwen3"]),
    heads=st.sampled_from([2, 4]),
    groups=st.sampled_from([1, 2]),
    tied=st.booleans(),
    biases=st.booleans(),
    scaled=st.booleans(),
    words=st.integers(50, 140),
)
def test_language_configs(kind, heads, groups, tied, biases, scaled, words, tmp_path_factory):
    scaling = SCALING if scaled else None
    check_language(peer_language(kind, heads, groups, tied, biases, scaling, words), tmp_path_factory.mktemp("peer"))


def test_the_checkpoint_holds_the_weights_and_a_second_import_is_the_same(tmp_path):
    peer_language("llama").to(torch.bfloat16).save_pretrained(tmp_path / "peer", max_shard_size="20KB")
    assert len(list((tmp_path / "peer").glob("*.safetensors"))) > 1
    for name in ("one", "two"):
        command.import_weights(str(tmp_path / "peer"), str(tmp_path / name), codes=32)
    one, two = (dict(flatten(read_params(tmp_path / n))) for n in ("one", "two"))
    assert one.keys() == two.keys() and all(np.array_equal(one[k], two[k]) for k in one)
    assert {str(v.dtype) for v in one.values()} == {"bfloat16"}  # the file's dtype is kept
    rows = np.asarray(one["language/embed_visual"], np.float32)[:34]
    text = np.asarray(one["language/embed_text"], np.float32)
    assert abs(rows.std() / text.std() - 1) < 0.1 and rows.shape[0] == 34
    assert json.loads(read_meta(tmp_path / "one")["config"])["model"]["language"]["heads"] == 4


# ---- Vision encoders -------------------------------------------------------------------------------------------------


def peer_vision(layout):
    common = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=7
    )
    if layout == "clip":
        model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**common))
    elif layout == "siglip":
        model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**common))
    else:
        model = transformers.Blip2VisionModel(transformers.Blip2VisionConfig(**common))
    return randomise(model)


@pytest.mark.parametrize("layout", ["clip", "siglip", "blip2"])
def test_vision_encoders(layout, tmp_path):
    peer = peer_vision(layout)
    peer.save_pretrained(tmp_path)
    assert command.guess_kind(tmp_path) == layout
    importer, model = command.import_vision(tmp_path, layout)
    params = importer.load()
    config = ViTConfig(**model["encoder"], scan=False)
    abstract = nnx.eval_shape(lambda: ViT(config, rngs=nnx.Rngs(params=0)))
    x = np.random.default_rng(0).standard_normal((2, 28, 28, 3)).astype(np.float32)
    found = nnx.merge(nnx.graphdef(abstract), params["encoder"])(jnp.asarray(x))
    with torch.no_grad():
        wanted = peer(torch.tensor(x).permute(0, 3, 1, 2)).last_hidden_state.numpy()
    assert gap(found, wanted if layout == "siglip" else wanted[:, 1:]) < 1e-4


def test_timm_names_of_units_encoder(tmp_path):
    """UNIT's shape under timm's names: written by the table, read back the same."""
    shape = dict(image_size=28, patch_size=14, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    (tmp_path / "config.json").write_text(json.dumps(shape | {"model_type": "unit", "mlp_ratio": 4}))
    config = ViTConfig(**vision.vit_config("unit", shape), scan=False)
    params = nnx.to_pure_dict(nnx.state(ViT(config, rngs=nnx.Rngs(params=0)), nnx.Param))
    flat = {f"encoder/{k}": v for k, v in flatten(params)}
    table = vision.table("unit", 2)
    shapes = foreign_shapes(table, {k: v.shape for k, v in flat.items()})
    assert shapes["blocks.1.attn.qkv.weight"] == (48, 16) and shapes["patch_embed.proj.weight"] == (16, 3, 14, 14)
    tensors = to_theirs(table, flat.__getitem__, shapes)
    list(write_safetensors(tmp_path, "model", shapes, np.float32, tensors))
    importer, _ = command.import_vision(tmp_path, command.guess_kind(tmp_path))
    back = dict(flatten(importer.load()))
    assert back.keys() == flat.keys() and all(np.array_equal(back[k], flat[k]) for k in flat)


# ---- LaVIT -----------------------------------------------------------------------------------------------------------


def published_keys():
    """Components of the published checkpoint, shapes at the real size; `tests/data/README.md` tells their source."""
    import gzip
    import pathlib

    file = pathlib.Path(__file__).parent / "data" / "lavit_state_dict_keys.json.gz"
    return json.loads(gzip.decompress(file.read_bytes()))


def abstract_shapes(make):
    abstract = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(params=0)))
    state = nnx.to_pure_dict(nnx.state(abstract, nnx.Param))
    return {path: tuple(leaf.shape) for path, leaf in flatten(state)}


def test_every_published_key_at_the_real_size():
    """On abstract arrays: what import reads and export writes is what the published files hold, shape by shape."""
    import functools

    from unimm_jax.interop import diffusion
    from unimm_jax.models.conditioner import Conditioner, ConditionerConfig
    from unimm_jax.models.denoiser import UNet, UNetConfig
    from unimm_jax.models.tokenizer import TokenizerConfig, VisualTokenizer
    from unimm_jax.models.unified import UnifiedConfig, UnifiedModel
    from unimm_jax.models.vae import VAE, VAEConfig

    keys = {name: {k: tuple(v) for k, v in part.items()} for name, part in published_keys().items()}
    eva, encoder = keys["visual_tokenizer/eva_vitg_psz14.bin"], keys["visual_tokenizer/tokenizer_encoder.bin"]
    low = keys["visual_tokenizer/tokenizer_decoder.bin"]
    vit = ViTConfig(**lavit.encoder_shape(eva))
    assert vit == ViTConfig()
    settings = TokenizerConfig(**lavit.tokenizer_shape(encoder, low))
    assert settings == TokenizerConfig()
    language = LanguageConfig()
    make = functools.partial(UnifiedModel, vit, settings, language, UnifiedConfig())
    v = command.Vocabulary(32000, 16384)
    unified = abstract_shapes(functools.partial(make, text_rows=v.text, visual_rows=v.visual_rows))
    tokenizer = abstract_shapes(functools.partial(VisualTokenizer, vit, settings))
    checked = {}

    def check(component, table, shapes, unused=lambda name: False):
        wanted = {k: s for k, s in keys[component].items() if not unused(k)}
        assert foreign_shapes(table, shapes) == wanted
        checked.setdefault(component, set()).update(wanted)

    check(
        "visual_tokenizer/eva_vitg_psz14.bin",
        lavit.encoder("encoder/", "", 40),
        tokenizer,
        lambda name: name.startswith(("norm.", "head.")),
    )
    check("visual_tokenizer/tokenizer_encoder.bin", lavit.tokenizer_encoder(12), tokenizer)
    check("language_model/visual_weight.bin", lavit.visual_weight(12), unified)
    check("language_model/pytorch_model-*.bin", llama.language(language, 32000, 16386), unified)
    for kind, component in (("low", "tokenizer_decoder"), ("high", "highres_tokenizer_decoder")):
        component = f"visual_tokenizer/{component}.bin"
        c = ConditionerConfig(**lavit.conditioner_shape(keys[component], 16))
        parts = functools.partial(
            command.Parts,
            conditioner=functools.partial(Conditioner, 1408, 256, c),
            tokenizer=functools.partial(VisualTokenizer, vit, settings),
        )
        shapes = {k.removeprefix("tokenizer/"): s for k, s in abstract_shapes(parts).items()}
        check(component, lavit.feature_decoder(12, kind), shapes)
    sdxl = UNetConfig(
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(5, 10, 20),
        transformer_layers_per_block=(1, 2, 10),
        cross_attention_dim=2048,
        addition_embed_type="text_time",
    )
    for part, config, linear in (("pixel_decoding", UNetConfig(), False), ("highres_pixel_decoding", sdxl, True)):
        shapes = abstract_shapes(functools.partial(command.Parts, unet=functools.partial(UNet, config)))
        check(f"{part}/unet/diffusion_pytorch_model.bin", diffusion.table(shapes, "unet/", linear), shapes)
    shapes = abstract_shapes(functools.partial(command.Parts, vae=functools.partial(VAE, VAEConfig())))
    check("pixel_decoding/vae/diffusion_pytorch_model.safetensors", diffusion.table(shapes, "vae/", True), shapes)
    assert len(checked) == 9


# ---- Bad input -------------------------------------------------------------------------------------------------------


@pytest.fixture
def peer_folder(tmp_path):
    peer_language("llama").save_pretrained(tmp_path / "peer")
    return tmp_path / "peer"


def refused(folder, tmp_path, match, **options):
    with pytest.raises(ValueError, match=match):
        command.import_weights(str(folder), str(tmp_path / "out"), codes=32, **options)
    assert not (tmp_path / "out").exists()  # nothing was written


def rewrite(file, change):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_missing_extra_and_misshaped_tensors_are_all_listed(peer_folder, tmp_path):
    def change(tensors):
        del tensors["model.norm.weight"]
        tensors["model.extra"] = np.zeros(3, np.float32)
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:5]

    rewrite(peer_folder / "model.safetensors", change)
    refused(
        peer_folder,
        tmp_path,
        r"(?s)model.norm.weight \[32\] is missing.*lm_head.weight is \[5, 32\], the model wants \[101, 32\]"
        r".*model.extra \[3\] is not known",
    )


def test_truncated_and_corrupt_files_are_named(peer_folder, tmp_path):
    file = peer_folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    refused(peer_folder, tmp_path, r"model.safetensors is truncated: \S+ ends beyond the file")
    file.write_bytes(whole[:100])
    refused(peer_folder, tmp_path, "model.safetensors is truncated: its header does not fit")
    file.write_bytes(struct.pack("<Q", 20) + b"{" * 40)
    refused(peer_folder, tmp_path, "model.safetensors is corrupt: its header cannot be read")
    file.unlink()
    (peer_folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04 not an archive")
    refused(peer_folder, tmp_path, "pytorch_model.bin is truncated or corrupt")


class Evil:
    def __reduce__(self):
        return (print, ("code was executed",))


def test_a_pickle_that_would_run_code_is_refused(peer_folder, tmp_path, capsys):
    (peer_folder / "model.safetensors").unlink()
    file = peer_folder / "pytorch_model.bin"
    torch.save({"model.norm.weight": torch.zeros(3), "more": Evil()}, file)
    refused(peer_folder, tmp_path, "pytorch_model.bin is refused: .*execute code")
    file.write_bytes(pickle.dumps(Evil()))
    refused(peer_folder, tmp_path, "pytorch_model.bin is refused: .*execute code")
    assert "code was executed" not in capsys.readouterr().out


def test_unknown_architectures_and_settings_are_named(peer_folder, tmp_path):
    file = peer_folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"model_type": "mamba"}))
    refused(peer_folder, tmp_path, "'mamba', which is not known; known are llama, qwen2, qwen3")
    file.write_text(json.dumps(config | {"hidden_act": "gelu", "rope_parameters": {"rope_type": "yarn"}}))
    refused(peer_folder, tmp_path, "cannot be represented: hidden_act 'gelu'.*rope scaling 'yarn'")
    file.unlink()
    refused(peer_folder, tmp_path, "there is no .*config.json; the architecture is read from it")


def test_a_missing_shard_and_a_used_output(peer_folder, tmp_path):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (peer_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(peer_folder, tmp_path, "names files that are not in .*: model-00001-of-00002.safetensors")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("")
    with pytest.raises(ValueError, match="used is not empty"):
        command.import_weights(str(peer_folder), str(tmp_path / "used"))
    with pytest.raises(BadFile, match="no file or directory"):
        Tensors(tmp_path / "nowhere")


def test_pytorch_files_read_like_safetensors(tmp_path):
    peer = peer_language("llama").to(torch.bfloat16)
    peer.save_pretrained(tmp_path / "safe")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "config.json").write_text((tmp_path / "safe" / "config.json").read_text())
    torch.save(peer.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    for name in ("safe", "bin"):
        command.import_weights(str(tmp_path / name), str(tmp_path / f"{name}_out"), codes=32)
    a, b = (dict(flatten(read_params(tmp_path / f"{n}_out"))) for n in ("safe", "bin"))
    assert a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


# ---- Large models ----------------------------------------------------------------------------------------------------

MEASURED = """
import sys, threading, time
peak, done = 0, False

def watch():
    global peak
    while not done:
        with open("/proc/self/status") as f:
            peak = max(peak, next(int(line.split()[1]) for line in f if line.startswith("RssAnon")))
        time.sleep(0.02)

threading.Thread(target=watch, daemon=True).start()
kind, source, output = sys.argv[1:4]
if kind == "import":
    from unimm_jax.import_weights import import_weights
    import_weights(source, output, codes=32)
else:
    from unimm_jax.export import export
    export(source, output, verify=False)
done = True
print(peak * 1024)
"""


def measured(kind, source, output):
    """Peak anonymous resident bytes of an import or an export in a process of its own."""
    import subprocess
    import sys

    done = subprocess.run([sys.executable, "-c", MEASURED, kind, source, output], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return int(done.stdout.split()[-1])


@pytest.mark.slow
def test_a_billion_parameters_come_in_and_go_out_within_their_memory(tmp_path):
    """pytest -m slow tests/test_import_weights.py; Linux. TinyLLaMA's shape, bfloat16, sharded."""
    import ml_dtypes

    config = dict(
        model_type="llama",
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
    )
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    shape = LanguageConfig(**llama.language_config(config))
    shapes = abstract_shapes(lambda rngs: LanguageModel(shape, 32000, 128, rngs=rngs))
    table = llama.language(shape, 32000, 0, ours="")
    wanted = foreign_shapes(table, shapes)
    rng = np.random.default_rng(0)
    random = lambda s: rng.standard_normal(s, np.float32).astype(ml_dtypes.bfloat16)
    from unimm_jax.interop import files

    old, files.SHARD_BYTES = files.SHARD_BYTES, 2**30
    list(write_safetensors(source, "model", wanted, ml_dtypes.bfloat16, ((n, random(s)) for n, s in wanted.items())))
    files.SHARD_BYTES = old
    size = sum(int(np.prod(s)) for s in wanted.values()) * 2
    assert size > 2.1e9 and len(list(source.glob("*.safetensors"))) > 1
    for kind, a, b in (("import", "source", "in"), ("export", "in", "out")):
        peak = measured(kind, str(tmp_path / a), str(tmp_path / b))
        print(f"{kind}: peak {peak / 2**30:.2f} GiB, the model has {size / 2**30:.2f} GiB")
        assert peak <= size + 1.5 * 2**30
    there, here = Tensors(source), Tensors(tmp_path / "out")
    assert there.shapes == here.shapes
    for name in list(wanted)[::20]:
        assert here.dtype(name) == ml_dtypes.bfloat16 and np.array_equal(there[name], here[name])


SHARDED = """
import pathlib, sys
from unimm_jax.import_weights import import_language
params = import_language(pathlib.Path(sys.argv[1]), 32)[0].load()
for name in ("gate", "up", "down"):
    kernel = params["language"]["layers"][name]["kernel"]
    shard = kernel.addressable_shards[0].data
    assert len(kernel.sharding.device_set) == 8 and shard.size * 8 == kernel.size, (name, shard.shape)
"""


def test_on_eight_devices_the_arrays_arrive_sharded(peer_folder):
    import os
    import subprocess
    import sys

    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", SHARDED, str(peer_folder)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_stage_starts_from_published_files(run, tmp_path):
    """`init_from` names the folder as it was downloaded; what the stage freezes is then the file's to the bit."""
    from conftest import tiny

    from unimm_jax.data.packing import Records
    from unimm_jax.train import train

    words = Records(run / "records").tokenizer.size
    config = transformers.AutoConfig.for_model(
        "llama",
        vocab_size=words,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    peer = randomise(transformers.AutoModelForCausalLM.from_config(config))
    peer.save_pretrained(tmp_path / "peer")
    stage = tiny("stage1", train__steps=2, data__records=str(run / "records"))
    stage.init_from = (dict(checkpoint=str(tmp_path / "peer"), rename=[("language/", "language/")]),)
    stage.optimizer.rules = [("language/(?!(embed|head)_visual).*", None), ("(?!language/).*|language/.*visual", 1.0)]
    train(stage, tmp_path / "stage1")
    params = dict(flatten(read_params(tmp_path / "stage1")))
    table = llama.language(LanguageConfig(layers=2), words, 0)
    source = peer.state_dict()
    for name, array in to_theirs(table, params.__getitem__, source):
        assert np.array_equal(array, source[name].numpy()), name
    # the new rows start like the text's
    spread = params["language/embed_visual"][: 2 + 32].std() / params["language/embed_text"].std()
    assert 0.8 < spread < 1.25
    stage.init_from = (dict(checkpoint=str(tmp_path / "peer"), rename=[("language/", "tongue/"), ("vision/", "")]),)
    with pytest.raises(ValueError, match="tongue/norm/scale .*not in this model(.|\n)*'vision/' matches no parameter"):
        train(stage, tmp_path / "wrong")
    stage.init_from = (dict(checkpoint=str(run / "records"), rename=[("", "")]),)
    with pytest.raises(ValueError, match="neither a checkpoint nor known weights"):
        train(stage, tmp_path / "wrong")


def test_spare_rows_of_a_vocabulary_are_never_words(peer_folder, run):
    """A folder whose config.json has more rows than its tokenizer has words (Qwen pads so)."""
    from unimm_jax import text
    from unimm_jax.data.packing import Records

    words = Records(run / "records").tokenizer
    rows = words.size + 9
    (peer_folder / "tokenizer.json").write_text(words.payload["model"])
    config = json.loads((peer_folder / "config.json").read_text())
    (peer_folder / "config.json").write_text(json.dumps(config | {"vocab_size": rows}))
    found = text.load(str(peer_folder))
    assert (found.words, found.size) == (words.size, rows)
    assert text.TextTokenizer(found.payload).size == rows
    assert found.decode([*found.encode("a red circle"), rows - 1]) == words.decode(words.encode("a red circle"))
