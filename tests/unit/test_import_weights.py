"""Published weights in: models that `transformers` itself makes, LaVIT's layout, and every bad input by its message."""

import dataclasses
import functools
import gzip
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest
from flax import nnx
from helpers import has_stage, tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unimm_jax import resolve
from unimm_jax.checkpoint import read_meta, read_params
from unimm_jax.errors import (
    ConfigError,
    DataError,
    UnsupportedConfigError,
    UserError,
    WeightMismatchError,
    WeightsFileError,
)
from unimm_jax.interop import diffusion, encoders, importer, lavit, llama
from unimm_jax.interop import settings as settings_lib
from unimm_jax.interop.encoders import eva
from unimm_jax.interop.files import write_safetensors
from unimm_jax.interop.import_plan import Parts
from unimm_jax.interop.table import foreign_shapes, to_theirs
from unimm_jax.models.conditioner import Conditioner, ConditionerConfig
from unimm_jax.models.denoiser import UNet, UNetConfig
from unimm_jax.models.keys import Keys
from unimm_jax.models.language import LanguageConfig, LanguageModel
from unimm_jax.models.tokenizer import ImageTokenizer, ImageTokenizerConfig
from unimm_jax.models.unified import UnifiedConfig, UnifiedModel
from unimm_jax.models.vae import VAE, VAEConfig
from unimm_jax.models.vit import PIXEL_MEAN, ViT, ViTConfig
from unimm_jax.sharding import flatten
from unimm_jax.vocabulary import Vocabulary

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def exact():
    with jax.default_matmul_precision("highest"):
        yield


def gap(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.abs(a - b).max() / max(1.0, np.abs(b).max())


# ---- Language models -------------------------------------------------------------------------------------------------


def check_language(peer, folder):
    """Saved by transformers, imported here: equal logits; exported through the table: equal tensors."""
    peer.save_pretrained(folder)
    part, model = importer.import_language(folder, codes=32)
    params = part.load()
    config = dataclasses.replace(model["language"], scan=False)
    words = peer.config.vocab_size
    rows = params["language"]["embed_visual"].shape[0]
    abstract = nnx.eval_shape(lambda: LanguageModel(config, words, rows, rngs=Keys(params=0)))
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
    for name, array in to_theirs(table, flat.__getitem__, foreign_shapes(table, part.shapes)):
        assert np.array_equal(array, source[name]), name
    return params


@pytest.mark.parametrize(
    "kind, options",
    [
        ("llama", {}),
        ("llama", dict(tied=True, groups=4)),  # SmolLM2's shape
        ("llama", dict(scaling=peers.SCALING, words=128)),  # LLaMA 3.1
        ("qwen2", dict(tied=True)),
        ("qwen3", dict(groups=1)),
    ],
)
def test_language_families(kind, options, tmp_path):
    check_language(peers.language(kind, **options), tmp_path)


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
    scaling = peers.SCALING if scaled else None
    check_language(peers.language(kind, heads, groups, tied, biases, scaling, words), tmp_path_factory.mktemp("peer"))


def test_the_checkpoint_holds_the_weights_and_a_second_import_is_the_same(tmp_path):
    peers.language("llama").to(torch.bfloat16).save_pretrained(tmp_path / "peer", max_shard_size="20KB")
    assert len(list((tmp_path / "peer").glob("*.safetensors"))) > 1
    for name in ("one", "two"):
        importer.import_weights(str(tmp_path / "peer"), str(tmp_path / name), codes=32)
    one, two = (dict(flatten(read_params(tmp_path / n))) for n in ("one", "two"))
    assert one.keys() == two.keys() and all(np.array_equal(one[k], two[k]) for k in one)
    assert {str(v.dtype) for v in one.values()} == {"bfloat16"}  # the file's dtype is kept
    rows = np.asarray(one["language/embed_visual"], np.float32)[:34]
    text = np.asarray(one["language/embed_text"], np.float32)
    assert abs(rows.std() / text.std() - 1) < 0.1 and rows.shape[0] == 34
    meta = read_meta(tmp_path / "one")
    saved = json.loads(meta["config"])
    assert saved["stage"] == "language" and saved["size"] == "imported" and "objective" not in saved
    assert set(saved["model"]["language"]) == {f.name for f in dataclasses.fields(LanguageConfig)}  # no default is left
    assert resolve.sections_from_json(meta["config"])["language"].rope_theta == 5000


# ---- Vision encoders -------------------------------------------------------------------------------------------------


def vit(part):
    """The imported encoder."""
    config = dataclasses.replace(part.model["encoder"], scan=False)
    abstract = nnx.eval_shape(lambda: ViT(config, rngs=Keys(params=0)))
    return nnx.merge(nnx.graphdef(abstract), part.importer.load()["encoder"])


@pytest.mark.parametrize("layout", ["clip", "blip2"])
def test_vision_encoders(layout, tmp_path):
    peer = peers.vision(layout)
    peer.save_pretrained(tmp_path)
    assert importer.guess_kind(tmp_path) == layout
    x = np.random.default_rng(0).standard_normal((2, 28, 28, 3)).astype(np.float32)
    part = importer.import_encoder(tmp_path, layout)
    found = vit(part)(jnp.asarray(x))
    with torch.no_grad():
        wanted = peer(torch.tensor(x).permute(0, 3, 1, 2)).last_hidden_state.numpy()
    assert gap(found, wanted[:, 1:]) < 1e-4
    assert part.model["encoder"].pixel_mean == PIXEL_MEAN


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    """A tiny SigLIP with its image processor: (model, processor, directory)."""
    folder = tmp_path_factory.mktemp("siglip")
    peer = peers.vision("siglip")
    peer.save_pretrained(folder)
    processor = transformers.SiglipImageProcessor(size={"height": 28, "width": 28})
    processor.save_pretrained(folder)
    return peer, processor, folder


def test_siglip_from_pixels(siglip):
    """From uint8 images on, so that the pixel statistics count."""
    peer, processor, folder = siglip
    images = np.random.default_rng(0).integers(0, 256, (2, 28, 28, 3), dtype=np.uint8)
    with torch.no_grad():
        wanted = peer(**processor(list(images), return_tensors="pt")).last_hidden_state.numpy()
    assert importer.guess_kind(folder) == "siglip"
    model = vit(importer.import_encoder(folder, "siglip"))
    assert gap(model(model.normalize(jnp.asarray(images))), wanted) < 1e-4


def test_pixel_statistics_come_from_the_files(siglip, tmp_path):
    _, _, folder = siglip
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    file = tmp_path / "preprocessor_config.json"
    published = json.loads(file.read_text())
    statistics = lambda: importer.import_encoder(tmp_path, "siglip").model["encoder"].pixel_mean
    file.write_text(json.dumps(published | {"image_mean": [0.1, 0.2, 0.3]}))
    assert statistics() == (0.1, 0.2, 0.3)
    file.rename(tmp_path / "processor_config.json")  # where newer versions of transformers write it
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": published}))
    assert statistics() == (0.5, 0.5, 0.5)
    (tmp_path / "processor_config.json").unlink()
    assert statistics() == (0.5, 0.5, 0.5)  # the layout's own
    file.write_text(json.dumps(published | {"do_normalize": False}))
    assert statistics() == (0.0, 0.0, 0.0)
    file.write_text(json.dumps(published | {"image_mean": [0.1, 0.2]}))
    with pytest.raises(UnsupportedConfigError, match=r"preprocessor_config.json: image_mean is \[0.1, 0.2\]"):
        statistics()
    file.write_text(json.dumps(published | {"rescale_factor": 1.0}))
    with pytest.raises(UnsupportedConfigError, match="pixels must be scaled by 1/255"):
        statistics()


@pytest.mark.parametrize("name", ["CLIPVisionConfig", "SiglipVisionConfig", "Blip2VisionConfig"])
def test_settings_that_a_config_leaves_out_have_the_defaults_of_transformers(name):
    peer = getattr(transformers, name)()
    layout = encoders.get(encoders.name_of({"model_type": peer.model_type}))
    assert layout.vit_config({"model_type": peer.model_type}) == layout.vit_config(peer.to_dict())


def test_timm_names_of_units_encoder(tmp_path):
    """UNIT's shape under timm's names: written by the table, read back the same."""
    shape = dict(image_size=28, patch_size=14, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    (tmp_path / "config.json").write_text(json.dumps(shape | {"model_type": "unit", "mlp_ratio": 4}))
    layout = encoders.get("unit")
    config = ViTConfig(**layout.vit_config(shape), scan=False)
    params = nnx.to_pure_dict(nnx.state(ViT(config, rngs=Keys(params=0)), nnx.Param))
    flat = {f"encoder/{k}": v for k, v in flatten(params)}
    table = layout.table(2, "qkv", "encoder/")
    shapes = foreign_shapes(table, {k: v.shape for k, v in flat.items()})
    assert shapes["blocks.1.attn.qkv.weight"] == (48, 16) and shapes["patch_embed.proj.weight"] == (16, 3, 14, 14)
    tensors = to_theirs(table, flat.__getitem__, shapes)
    list(write_safetensors(tmp_path, "model", shapes, np.float32, tensors))
    part = importer.import_encoder(tmp_path, importer.guess_kind(tmp_path))
    back = dict(flatten(part.importer.load()))
    assert back.keys() == flat.keys() and all(np.array_equal(back[k], flat[k]) for k in flat)


# ---- LaVIT -----------------------------------------------------------------------------------------------------------


def published_keys():
    """Components of the published checkpoint, shapes at the real size; `tests/data/README.md` tells their source."""
    return json.loads(gzip.decompress((peers.DATA / "lavit_state_dict_keys.json.gz").read_bytes()))


def abstract_shapes(make):
    abstract = nnx.eval_shape(lambda: make(rngs=Keys(params=0)))
    state = nnx.to_pure_dict(nnx.state(abstract, nnx.Param))
    return {path: tuple(leaf.shape) for path, leaf in flatten(state)}


def test_every_published_key_at_the_real_size():
    """On abstract arrays: what import reads and export writes is what the published files hold, shape by shape."""
    keys = {name: {k: tuple(v) for k, v in part.items()} for name, part in published_keys().items()}
    eva_keys, encoder = keys["visual_tokenizer/eva_vitg_psz14.bin"], keys["visual_tokenizer/tokenizer_encoder.bin"]
    low = keys["visual_tokenizer/tokenizer_decoder.bin"]
    encoder_config = ViTConfig(**lavit.encoder_shape(eva_keys))
    assert encoder_config == ViTConfig()
    shape = ImageTokenizerConfig(**lavit.tokenizer_shape(encoder, low))
    assert shape == ImageTokenizerConfig()
    language = LanguageConfig()
    make = functools.partial(UnifiedModel, encoder_config, shape, language, UnifiedConfig())
    v = Vocabulary(32000, 16384)
    unified = abstract_shapes(functools.partial(make, text_rows=v.text_rows, visual_rows=v.visual_rows))
    tokenizer = abstract_shapes(functools.partial(ImageTokenizer, encoder_config, shape))
    checked = {}

    def check(component, table, shapes, unused=lambda name: False):
        wanted = {k: s for k, s in keys[component].items() if not unused(k)}
        assert foreign_shapes(table, shapes) == wanted
        checked.setdefault(component, set()).update(wanted)

    check(
        "visual_tokenizer/eva_vitg_psz14.bin",
        eva.table(40),
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
            Parts,
            conditioner=functools.partial(Conditioner, 1408, 256, c),
            tokenizer=functools.partial(ImageTokenizer, encoder_config, shape),
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
        shapes = abstract_shapes(functools.partial(Parts, unet=functools.partial(UNet, config)))
        check(f"{part}/unet/diffusion_pytorch_model.bin", diffusion.table(shapes, "unet/", linear), shapes)
    shapes = abstract_shapes(functools.partial(Parts, vae=functools.partial(VAE, VAEConfig())))
    check("pixel_decoding/vae/diffusion_pytorch_model.safetensors", diffusion.table(shapes, "vae/", True), shapes)
    assert len(checked) == 9


# ---- Settings of the weights against those of the stage --------------------------------------------------------------


def stage(**model):
    """What `open_weights` reads of a stage's config."""
    return types.SimpleNamespace(model=model)


def test_siglip_in_a_stage_with_clips_pixels_is_refused_by_name(siglip):
    _, _, folder = siglip
    vit = importer.import_encoder(folder, "siglip").model["encoder"]
    entry = dict(checkpoint=str(folder), rename=[("encoder/", "encoder/")])
    clip = ViTConfig(**dataclasses.asdict(vit) | dict(pixel_mean=PIXEL_MEAN))
    with pytest.raises(WeightMismatchError) as error:
        importer.open_weights(folder, entry, stage(encoder=clip))
    assert f"config.model.encoder.pixel_mean is {PIXEL_MEAN}, the weights have (0.5, 0.5, 0.5)" in str(error.value)
    assert 'add allow=("encoder.pixel_mean",) to the entry' in str(error.value) and "pixel_std" not in str(error.value)
    importer.open_weights(folder, entry, stage(encoder=dataclasses.replace(vit, scan=False, remat="full")))
    importer.open_weights(folder, entry | dict(allow=("encoder.pixel_mean",)), stage(encoder=clip))
    with pytest.raises(ConfigError, match="allow of .* names 'encoder.pixels'"):
        importer.open_weights(folder, entry | dict(allow=("encoder.pixels",)), stage(encoder=clip))


def test_every_difference_of_a_language_model_is_listed(tmp_path):
    peers.language("llama", theta=500000.0, scaling=peers.SCALING).save_pretrained(tmp_path)
    entry = dict(checkpoint=str(tmp_path), rename=[("language/", "language/")])
    found = importer.import_language(tmp_path, 32).model["language"]
    ours = dataclasses.replace(found, rope_theta=10000.0, rope_scaling=(), eps=1e-5)
    with pytest.raises(WeightMismatchError) as error:
        importer.open_weights(tmp_path, entry, stage(language=ours), Vocabulary(101, 32))
    assert "config.model.language.rope_theta is 10000.0, the weights have 500000.0" in str(error.value)
    assert "rope_scaling is (), the weights have (8.0, 1.0, 4.0, 32.0)" in str(error.value)
    assert "config.model.language.eps is 1e-05, the weights have 1e-06" in str(error.value)
    importer.open_weights(tmp_path, entry, stage(language=found), Vocabulary(101, 32))
    # an import of the same weights is compared, too
    importer.import_weights(str(tmp_path), str(tmp_path / "in"), codes=32)
    with pytest.raises(WeightMismatchError, match="rope_theta is 10000.0, the weights have 500000.0"):
        importer.open_weights(tmp_path / "in", entry, stage(language=ours))
    importer.open_weights(tmp_path / "in", entry, stage(language=found))


def test_settings_of_parts_that_are_not_read_are_not_compared():
    a, b = ImageTokenizerConfig(), ImageTokenizerConfig(eps=0.0, positions="grid", selection="all", scan=False)
    source, target = {"image_tokenizer": a, "encoder": ViTConfig()}, {"image_tokenizer": b, "encoder": ViTConfig()}
    paths = ["encoder/cls", "merger/norm/scale", "decoder/queries", "selector/norm/scale", "adapter/kernel"]

    def differing(*rename):
        components = settings_lib.components_read(dict(rename=rename), paths)
        return set(settings_lib.differences(components, source, target))

    assert differing(("encoder/", "encoder/")) == set()
    assert differing(("merger/", "merger/")) == {"image_tokenizer.eps"}
    assert differing(("", "image_tokenizer/")) == {f"image_tokenizer.{n}" for n in ("eps", "positions", "selection")}
    assert differing(("merger/", "adapter/")) == set()


def test_one_value_per_level_equals_one_value():
    a, b = UNetConfig(attention_head_dim=8), UNetConfig(attention_head_dim=(8, 8, 8, 8))
    assert not settings_lib.differences(["unet"], {"unet": a}, {"unet": b})
    c = UNetConfig(attention_head_dim=(8, 8, 8, 4))
    assert set(settings_lib.differences(["unet"], {"unet": a}, {"unet": c})) == {"unet.attention_head_dim"}


def test_stages_that_start_from_each_other_have_equal_settings():
    """Of every shipped config, with the source's stage as the config says."""
    known = set(resolve.stages())
    checked = 0
    for size in ("7b", "illume-7b", "laptop", "laptop-lavit", "laptop-illume"):
        names = [name for name in known if has_stage(name, size)]
        configs = {name: resolve.parse(resolve.load(f"{name}:{size}")) for name in names}
        for config in configs.values():
            for entry in config.init_from:
                source = entry["checkpoint"].removeprefix("../")
                published = {"sd15_unet": {"unet": UNetConfig()}, "sd15_vae": {"vae": VAEConfig()}}
                sections = configs[source].model if source in known else published[source]
                paths = [f"{component}/x" for component in settings_lib.SECTIONS]
                settings_lib.check(source, entry, paths, sections, config.model)
                checked += bool(settings_lib.components_read(entry, paths))
    assert checked > 20


# ---- Bad input -------------------------------------------------------------------------------------------------------


@pytest.fixture
def peer_folder(tmp_path):
    peers.language("llama", layers=1).save_pretrained(tmp_path / "peer")
    return tmp_path / "peer"


def refused(folder, tmp_path, match, **options):
    with pytest.raises(UserError, match=match):
        importer.import_weights(str(folder), str(tmp_path / "out"), codes=32, **options)
    assert not (tmp_path / "out").exists()  # nothing was written


def test_missing_extra_and_misshaped_tensors_are_all_listed(peer_folder, tmp_path):
    from safetensors.numpy import load_file, save_file

    file = peer_folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    tensors["model.extra"] = np.zeros(3, np.float32)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:5]
    save_file(tensors, file)
    refused(
        peer_folder,
        tmp_path,
        r"(?s)model.norm.weight \[32\] is missing.*lm_head.weight is \[5, 32\], the model needs \[101, 32\]"
        r".*model.extra \[3\] is not known",
    )


def test_bad_files_write_nothing(peer_folder, tmp_path):
    """Every way in which a tensor file can be bad is in test_tensor_files.py."""
    file = peer_folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    refused(peer_folder, tmp_path, r"model.safetensors is truncated: \S+ ends beyond the file")
    file.unlink()
    refused(peer_folder, tmp_path, "contains no .safetensors and no .bin file")


def test_unknown_architectures_and_settings_are_named(peer_folder, tmp_path):
    file = peer_folder / "config.json"
    config = json.loads(file.read_text())

    def with_settings(**changes):
        file.write_text(json.dumps(config | changes))
        return peer_folder

    refused(with_settings(model_type="mamba"), tmp_path, "'mamba', which is not known; known are llama, qwen2, qwen3")
    bad = dict(hidden_act="gelu", rope_parameters={"rope_type": "yarn"})
    refused(with_settings(**bad), tmp_path, "cannot be represented: hidden_act 'gelu'.*rope scaling 'yarn'")
    refused(with_settings(hidden_size="32"), tmp_path, "config.json: hidden_size is '32'; an integer from 1 to")
    refused(with_settings(num_hidden_layers=10**12), tmp_path, "num_hidden_layers is 1000000000000; an integer from 1")
    refused(with_settings(rms_norm_eps=float("nan")), tmp_path, "rms_norm_eps is nan; a positive number")
    refused(
        with_settings(num_key_value_heads=3), tmp_path, "4 heads with 3 key/value heads of width 8 are not possible"
    )
    refused(with_settings(rope_parameters=[1]), tmp_path, r"rope_parameters is \[1\]; an object is needed")
    file.write_text(json.dumps({k: v for k, v in config.items() if k != "vocab_size"}))
    refused(peer_folder, tmp_path, "config.json has no vocab_size")
    file.unlink()
    refused(peer_folder, tmp_path, "there is no .*config.json; the architecture is read from it")


@pytest.mark.parametrize(
    "content, match",
    [
        (b"[" * 100_000, "its JSON is nested too deeply"),
        (b"[1, 2]", "it holds a list instead of a JSON object"),
        (b"\xff\xfe{}", "it is not UTF-8 text"),
        (b'{"model_type": ', "config.json is not JSON"),
    ],
)
def test_a_config_that_is_none_is_one_line(content, match, peer_folder, tmp_path):
    (peer_folder / "config.json").write_bytes(content)
    refused(peer_folder, tmp_path, match)
    entry = dict(checkpoint=str(peer_folder), rename=[("language/", "language/")])
    with pytest.raises(WeightsFileError, match=f"neither a checkpoint nor weights that can be imported: .*{match}"):
        importer.open_weights(peer_folder, entry, tiny("text"))


def test_wrong_paths_kinds_and_outputs_are_one_line(peer_folder, tmp_path):
    refused(tmp_path / "nowhere", tmp_path, "there is no file or directory .*nowhere")
    refused(peer_folder, tmp_path, "--kind=onnx is not known; kinds are lavit, language, eva", kind="onnx")
    importer.import_weights(str(peer_folder), str(tmp_path / "in"), codes=32)
    refused(tmp_path / "in", tmp_path, "in is already a checkpoint of unimm_jax")
    refused(peer_folder, tmp_path, "cannot be represented: hidden_act 'silu'", kind="siglip")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("")
    with pytest.raises(DataError, match="used is not empty; give another --output"):
        importer.import_weights(str(peer_folder), str(tmp_path / "used"))
    entry = dict(checkpoint=str(peer_folder), rename=[("language/", "language/")])
    with pytest.raises(ConfigError, match="has no part 'language' "):
        importer.open_weights(peer_folder, entry | dict(part="language"), tiny("text"))
    with pytest.raises(ConfigError, match="kind 'gpt' of .* is not known"):
        importer.open_weights(peer_folder, entry | dict(kind="gpt"), tiny("text"))
