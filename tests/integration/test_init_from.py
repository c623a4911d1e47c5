"""Stages that start from published weights, and imports in processes of their own."""

import dataclasses
import json
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import peers
import pytest
from flax import nnx
from helpers import main_command, peak_memory, tiny, xla_flags

from unimm_jax import environment, memory, text_tokenizer
from unimm_jax.checkpoint import read_params
from unimm_jax.data.records import Records
from unimm_jax.errors import WeightMismatchError, WeightsFileError
from unimm_jax.interop import files, llama
from unimm_jax.interop.files import Tensors, write_safetensors
from unimm_jax.interop.table import foreign_shapes, to_theirs
from unimm_jax.models.keys import Keys
from unimm_jax.models.language import LanguageConfig, LanguageModel
from unimm_jax.sharding import flatten
from unimm_jax.train import train

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

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
    from unimm_jax.interop.importer import import_weights
    import_weights(source, output, codes=32)
else:
    from unimm_jax.interop.exporter import export
    export(source, output, verify=False)
done = True
print(peak * 1024)
"""


def measured(kind, source, output):
    """Peak anonymous resident bytes of an import or an export in a process of its own."""
    done = subprocess.run([sys.executable, "-c", MEASURED, kind, source, output], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return int(done.stdout.split()[-1])


def write_billion(folder, rows):
    """Writes a LLaMA of TinyLLaMA's shape with random values, bfloat16, sharded: (name → shape, bytes)."""
    config = dict(
        model_type="llama",
        vocab_size=rows,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
    )
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    shape = LanguageConfig(**llama.language_config(config))
    abstract = nnx.eval_shape(lambda: LanguageModel(shape, rows, 128, rngs=Keys(params=0)))
    shapes = {path: leaf.shape for path, leaf in flatten(nnx.to_pure_dict(nnx.state(abstract, nnx.Param)))}
    wanted = foreign_shapes(llama.language(shape, rows, 0, ours=""), shapes)
    rng = np.random.default_rng(0)
    random = lambda s: rng.standard_normal(s, np.float32).astype(ml_dtypes.bfloat16) * 0.02
    old, files.SHARD_BYTES = files.SHARD_BYTES, 2**30
    list(write_safetensors(folder, "model", wanted, ml_dtypes.bfloat16, ((n, random(s)) for n, s in wanted.items())))
    files.SHARD_BYTES = old
    return wanted, sum(int(np.prod(s)) for s in wanted.values()) * 2


@pytest.mark.slow
def test_a_billion_parameters_come_in_and_go_out_within_their_memory(tmp_path):
    """pytest -m slow tests/integration/test_init_from.py; Linux. TinyLLaMA's shape, bfloat16, sharded."""
    source = tmp_path / "source"
    wanted, size = write_billion(source, 32000)
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
from unimm_jax.interop.importer import import_language
params = import_language(pathlib.Path(sys.argv[1]), 32).importer.load()
for name in ("gate", "up", "down"):
    kernel = params["language"]["layers"][name]["kernel"]
    shard = kernel.addressable_shards[0].data
    assert len(kernel.sharding.device_set) == 8 and shard.size * 8 == kernel.size, (name, shard.shape)
"""


def test_on_eight_devices_the_arrays_arrive_sharded(tmp_path):
    peers.language("llama", layers=1).save_pretrained(tmp_path)
    env = os.environ | {"XLA_FLAGS": xla_flags(8), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", SHARDED, str(tmp_path)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def published(run, tmp_path_factory):
    """A LLaMA with the text vocabulary of the tiny run: (model, directory, number of text rows)."""
    folder = tmp_path_factory.mktemp("published")
    rows = Records(run / "records").text_tokenizer.num_rows
    config = transformers.AutoConfig.for_model(
        "llama",
        vocab_size=rows,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        rms_norm_eps=1e-5,
    )
    peer = peers.randomize(transformers.AutoModelForCausalLM.from_config(config))
    peer.save_pretrained(folder)
    return peer, folder, rows


FROZEN = dict(
    optimizer__rules=(("language/(?!(embed|head)_visual).*", None), ("(?!language/).*|language/.*visual", 1.0))
)


def starting_from(run, *entries, **changes):
    """The config of stage 1 on the run's records that starts from other weights."""
    more = FROZEN | dict(init_from=entries, train__steps=2, data__records=str(run / "records"))
    return tiny("stage1", **more | changes)


def test_a_stage_starts_from_published_files(run, published, tmp_path):
    """`init_from` names the directory as it was downloaded; frozen weights stay equal to those of the file."""
    peer, folder, rows = published
    entry = dict(checkpoint=str(folder), rename=[("language/", "language/")])
    train(starting_from(run, entry), tmp_path / "stage1")
    params = dict(flatten(read_params(tmp_path / "stage1")))
    table = llama.language(LanguageConfig(layers=2), rows, 0)
    source = peer.state_dict()
    for name, array in to_theirs(table, params.__getitem__, source):
        assert np.array_equal(array, source[name].numpy()), name
    # the new rows start like the text rows
    spread = params["language/embed_visual"][: 2 + 32].std() / params["language/embed_text"].std()
    assert 0.8 < spread < 1.25


@pytest.mark.slow
def test_the_memory_of_a_stage_that_starts_from_a_billion_parameters_is_predicted(run, tmp_path):
    """pytest -m slow tests/integration/test_init_from.py -k predicted; needs 12 GiB. It loads, trains a step, saves."""
    rows = Records(run / "records").text_tokenizer.num_rows
    write_billion(tmp_path / "published", rows)
    shape = LanguageConfig(**llama.language_config(json.loads((tmp_path / "published" / "config.json").read_text())))
    language = {f"model__language__{field.name}": getattr(shape, field.name) for field in dataclasses.fields(shape)}
    entry = dict(checkpoint=str(tmp_path / "published"), rename=[("language/", "language/")])
    changes = language | dict(train__steps=1, evals={}, init_from=(entry,), data__records=str(run / "records"))
    measured = peak_memory(main_command("stage1", tmp_path / "stage1", **FROZEN | changes))
    config = tiny("stage1", **FROZEN | changes)
    data, _ = environment.inputs(config, str(tmp_path / "stage1"))
    predicted = max(memory.host_phases(config, data).values())
    print(f"predicted {predicted / 2**30:.2f} GiB, measured {measured / 2**30:.2f} GiB")
    assert abs(predicted / measured - 1) < 0.2


def test_entries_that_do_not_fit_stop_before_training(run, published, tmp_path):
    _, folder, _ = published
    wrong = dict(checkpoint=str(folder), rename=[("language/", "tongue/"), ("vision/", "")])
    with pytest.raises(WeightMismatchError, match="tongue/norm/scale .*not in this model(.|\n)*'vision/' matches no"):
        train(starting_from(run, wrong), tmp_path / "a")
    records = dict(checkpoint=str(run / "records"), rename=[("", "")])
    with pytest.raises(WeightsFileError, match="neither a checkpoint nor weights"):
        train(starting_from(run, records), tmp_path / "b")
    entry = dict(checkpoint=str(folder), rename=[("language/", "language/")])
    with pytest.raises(WeightMismatchError, match="config.model.language.rope_theta is 500000.0, the weights have 1"):
        train(starting_from(run, entry, model__language__rope_theta=500000.0), tmp_path / "c")
    # the stages of the run, too, are compared
    text = dict(checkpoint=str(run / "text"), rename=[("", "")])
    with pytest.raises(WeightMismatchError, match="config.model.language.eps is 0.001, the weights have 1e-05"):
        train(starting_from(run, text, model__language__eps=1e-3), tmp_path / "d")


def test_spare_rows_of_a_vocabulary_are_never_words(run, published, tmp_path):
    """A directory whose config.json has more rows than its tokenizer has words (Qwen pads so)."""
    _, folder, _ = published
    words = Records(run / "records").text_tokenizer
    rows = words.num_rows + 9
    (tmp_path / "tokenizer.json").write_text(words.payload["model"])
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": rows}))
    found = text_tokenizer.load(str(tmp_path))
    assert (found.vocab_size, found.num_rows) == (words.vocab_size, rows)
    assert text_tokenizer.TextTokenizer(found.payload).num_rows == rows
    assert found.decode([*found.encode("a red circle"), rows - 1]) == words.decode(words.encode("a red circle"))
