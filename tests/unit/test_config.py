"""Configs: defaults, completeness, checks, golden texts."""

import dataclasses
import json

import pytest
from helpers import ROOT, SIZES, STAGES, has_stage, tiny_dict

from unimm_jax import config as config_lib
from unimm_jax import resolve
from unimm_jax.errors import ConfigError

GOLDEN = ROOT / "tests" / "data" / "golden_configs"


def test_every_stage_and_size_is_listed_here():
    from configs import common

    assert sorted(STAGES) == resolve.stages() and SIZES == common.SIZES


@pytest.mark.parametrize("stage", STAGES)
def test_resolved_configs_are_the_golden_ones(stage, update_golden):
    """Rewrite with --update-golden where a change of settings is meant; the difference then shows its whole effect."""
    for size in (size for size in SIZES if has_stage(stage, size)):
        found = resolve.to_text(resolve.parse(resolve.load(f"{stage}:{size}")))
        file = GOLDEN / f"{stage}_{size}.txt"
        if update_golden:
            GOLDEN.mkdir(exist_ok=True)
            file.write_text(found)
        assert found == file.read_text(), f"{stage}:{size} differs from {file.name}"


@pytest.mark.parametrize("size", SIZES)
def test_a_saved_config_is_complete_and_reads_back(size):
    for stage in (stage for stage in STAGES if has_stage(stage, size)):
        config = resolve.parse(resolve.load(f"{stage}:{size}"))
        again = resolve.from_json(config.to_json())
        assert resolve.to_text(again) == resolve.to_text(config)
        saved = json.loads(config.to_json())
        for name, section in config.model.items():
            assert set(saved["model"][name]) == {f.name for f in dataclasses.fields(section)}


def test_a_changed_default_changes_no_saved_config(monkeypatch):
    """Neither one that this version wrote nor one of the first format, which left defaults out."""
    saved = resolve.parse(resolve.load("stage2:7b")).to_json()
    old = (ROOT / "tests" / "data" / "config_format1_stage2_7b.json").read_text()
    before = [resolve.to_text(resolve.from_json(text)) for text in (saved, old)]

    def changed(section):
        found = config_lib_defaults(section)
        return {k: v + 1 if type(v) is int else v * 2 if type(v) is float else v for k, v in found.items()}

    config_lib_defaults = config_lib.defaults_of
    monkeypatch.setattr(config_lib, "defaults_of", changed)
    assert resolve.load("stage2:7b").model.language.layers == 33  # a new config has the new default
    assert [resolve.to_text(resolve.from_json(text)) for text in (saved, old)] == before


def test_every_setting_can_be_overridden_at_every_size():
    for size in SIZES:
        config = resolve.load(f"stage2:{size}")
        config.model.language.layers = 2
        config.data.tasks.reconstruct = 0.1
        parsed = resolve.parse(config)
        assert parsed.model["language"].layers == 2 and parsed.data.tasks["reconstruct"] == 0.1


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(optimizer=dict(learning_rat=1.0)), "'learning_rat'; did you mean 'learning_rate'"),
        (dict(model=dict(langage=dict())), "config.model has no setting 'langage'; did you mean 'language'"),
        (dict(model=dict(language=dict(layer=2))), "language has no setting 'layer'; did you mean 'layers'"),
        (dict(trian=dict()), "config has no setting 'trian'; did you mean 'train'"),
        (dict(data=dict(task=dict())), "config.data has no setting 'task'; did you mean 'tasks'"),
        (dict(evals=dict(x=dict(type="loss", evry=2))), "config.evals.x has no setting 'evry'; did you mean 'every'"),
        (dict(evals=dict(x=dict(type="los"))), "there is no evaluator 'los'"),
        (dict(evals=dict(x=dict(every=3))), "config.evals.x has no type"),
        (dict(objective="language_modelling"), "config.objective is 'language_modelling'; it is one of"),
    ],
)  # fmt: skip
def test_unknown_names_are_refused_with_the_nearest_known(change, words):
    plain = dict(name="stage2:x", stage="stage2", size="x", objective="language_modeling")
    with pytest.raises(ConfigError) as error:
        resolve.complete(plain | change)
    assert words in str(error.value)


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("optimizer.muon_learning_rate", -1.0, "above 0"),
        ("optimizer.learning_rate", float("inf"), "finite"),
        ("optimizer.learning_rate", float("nan"), "finite"),
        ("optimizer.clip_norm", -1.0, "at least 0"),
        ("optimizer.warmup", 1.5, "from 0 to 1"),
        ("optimizer.end", float("nan"), "finite"),
        ("optimizer.schedule", "linear", "cosine, constant"),
        ("optimizer.name", "adam", "adamw, muon"),
        ("optimizer.beta1", 1.0, "from 0 to 1"),
        ("optimizer.beta2", -0.1, "from 0 to 1"),
        ("optimizer.weight_decay", -0.1, "at least 0"),
        ("train.steps", 0, "at least 1"),
        ("data.tasks.caption", -0.2, "at least 0"),
        ("data.tasks.caption", float("nan"), "at least 0"),
        ("data.prompt_dropout", 2.0, "from 0 to 1"),
        ("model.language.layers", -1, "at least 1"),
        ("model.language.kv_heads", 3, "do not divide"),
        ("model.unified.connector", "mixer", "merger, mlp"),
        ("dtype", "float8", "float32 or bfloat16"),
        ("mesh", (2, 2), "data, fsdp, tensor"),
        ("seed", -1, "from 0 to"),
        ("optimizer.rules", (("(", 1.0),), "not a regular expression"),
        ("optimizer.rules", ((".*", -1.0),), "above 0"),
        ("optimizer.rules", (("a",),), "not a pair"),
        ("optimizer.rules", ((".*", "x"),), "not a pair"),
        ("mesh", 2, "data, fsdp, tensor"),
        ("model.encoder.patch_size", 0, "at least 1"),
        ("model.language.kv_heads", 0, "at least 1"),
        ("model.language.remat", "ful", "none, full"),
        ("model.encoder.activation", "gelux", "gelu"),
        ("model.image_tokenizer.positions", "gridd", "order, grid"),
        ("model.image_tokenizer.architecture", "causal", "dynamic, bidirectional"),
        ("model.image_tokenizer.quantizer", "vq", "ema, simvq"),
        ("data.tasks", 3, "a dict from tasks"),
        ("init_from", ("../stage1",), "a dict with checkpoint and rename"),
        ("init_from", (dict(checkpoint="x", rename=(("", ""),), optionl="y"),), "did you mean 'optional'"),
        ("init_from", (dict(checkpoint="x", rename=()),), "rename is empty"),
        ("init_from", (dict(checkpoint="x", rename=(("(", ""),)),), "not a pair of a regular expression"),
        ("companions", dict(image_tokeniser="x"), "did you mean 'image_tokenizer'"),
    ],
)
def test_values_out_of_range_are_found_before_anything_runs(name, value, words):
    config = tiny_dict("stage3")
    with config.unlocked(), config.ignore_type():
        node = config
        *parents, last = name.split(".")
        for parent in parents:
            node = node[parent]
        node[last] = value
    with pytest.raises(ConfigError) as error:
        resolve.parse(config)
    assert words in str(error.value) and name.split(".")[-1] in str(error.value), str(error.value)


def test_a_size_without_a_selector_says_so():
    for size in SIZES:
        if not has_stage("selector", size):
            with pytest.raises(ConfigError) as error:
                resolve.load(f"selector:{size}")
            assert f"train configs/tokenizer.py:{size} right after the encoder" in str(error.value)
            assert "\n" not in str(error.value)
            config = resolve.parse(resolve.load(f"tokenizer:{size}"))
            assert [entry["checkpoint"] for entry in config.init_from] == ["../encoder"]


@pytest.mark.parametrize(
    "stage, changes, words",
    [
        ("tokenizer", dict(model__image_tokenizer__selection="argmax"), "it must be 'all'"),
        ("tokenizer", dict(loss__phase="selector"), "config.loss.phase is 'selector'"),
        ("tokenizer", dict(model__image_tokenizer__quantizer="simvq"), "config.loss.restart_below is 0.05"),
        ("stage1", dict(model__unified__connector="merger"), "config.model.unified.connector is 'merger'"),
    ],
)
def test_what_a_bidirectional_tokenizer_does_not_have_is_refused(stage, changes, words):
    with pytest.raises(ConfigError) as error:
        resolve.parse(tiny_dict(stage, "laptop-illume", **changes))
    assert words in str(error.value)


def test_variants_of_laptop_have_its_scale():
    for stage in STAGES:
        laptop = resolve.parse(resolve.load(f"{stage}:laptop"))
        for size in ("laptop-lavit", "laptop-illume"):
            if has_stage(stage, size):
                config = resolve.parse(resolve.load(f"{stage}:{size}"))
                longer = size == "laptop-illume" and stage in ("stage2", "stage3")
                assert (config.train.steps > laptop.train.steps) == longer
                assert longer or config.train.steps == laptop.train.steps
                fewer = size == "laptop-illume" and stage in ("stage1", "stage2", "stage3")  # longer examples
                assert (config.train.batch_size < laptop.train.batch_size) == fewer
                assert config.dtype == "float32" and config.model["encoder"] == laptop.model["encoder"]
    config = resolve.parse(resolve.load("stage2:laptop-illume"))
    assert config.model["unified"].connector == "mlp" and config.model["unified"].max_image_tokens == 16
    assert config.data.image_targets == config.data.text_targets == 0
    lavit = resolve.parse(resolve.load("selector:laptop-lavit"))
    published = resolve.parse(resolve.load("selector:7b"))
    assert lavit.loss == published.loss
    for name in ("positions", "eps", "sink", "decoder_sink"):
        assert getattr(lavit.model["image_tokenizer"], name) == getattr(published.model["image_tokenizer"], name)


def test_an_integer_may_be_overridden_by_a_fraction():
    config = resolve.complete(dict(name="x", stage="stage2", size="x", objective="language_modeling",
                                   optimizer=dict(clip_norm=1), data=dict(tasks=dict(caption=1))))  # fmt: skip
    config.optimizer.clip_norm = 0.5
    config.data.tasks.caption = 0.5
    config.train.steps = config.train.batch_size = 8
    assert resolve.parse(config).optimizer.clip_norm == 0.5


@pytest.mark.parametrize("section", ["train", "model", "evals", "data"])
def test_a_section_that_is_none_is_named(section):
    plain = dict(name="stage2:x", stage="stage2", size="x", objective="language_modeling")
    with pytest.raises(ConfigError, match=f"config.{section} is 5; it must be a section"):
        resolve.complete(plain | {section: 5})


def test_all_mistakes_are_listed_at_once():
    config = tiny_dict("stage3", train__steps=0, dtype="float8", optimizer__clip_norm=-1.0)
    with pytest.raises(ConfigError) as error:
        resolve.parse(config)
    for part in ("train.steps is 0", "float8", "clip_norm"):
        assert part in str(error.value)


def test_missing_inputs_are_listed_with_what_makes_them(tmp_path):
    config = resolve.parse(tiny_dict("stage3"))
    with pytest.raises(ConfigError) as error:
        resolve.check_paths(config, tmp_path / "stage3")
    assert "unimm_jax.pretokenize" in str(error.value) and "stage2; train that stage first" in str(error.value)


def test_config_files_that_fail_are_named(tmp_path):
    with pytest.raises(ConfigError, match="there is no config file stge2; did you mean stage2"):
        resolve.load("stge2:laptop")
    with pytest.raises(ConfigError, match="there is no size 'tabletop'"):
        resolve.load("stage2:tabletop")
    for text, words in (
        ("x = 1 / 0", "cannot be loaded: ZeroDivisionError"),
        ("x = (", "cannot be loaded: SyntaxError"),
        ("x = 1", "no function get_config"),
        ("def get_config(): return {}[0]", "failed: KeyError"),
    ):
        file = tmp_path / "mine.py"
        file.write_text(text)
        with pytest.raises(ConfigError, match=words):
            resolve.load(str(file))
    file.write_text(
        "from configs import stage2\ndef get_config(size=None):\n    c = stage2.get_config(size or 'laptop')\n"
        "    c.train.steps = 7\n    return c\n"
    )
    assert resolve.parse(resolve.load(str(file))).train.steps == 7
