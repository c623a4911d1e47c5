import hashlib
import json
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unimm_jax import checkpoint, sharding
from unimm_jax.checkpoint import Checkpoints
from unimm_jax.errors import CheckpointError, CorruptCheckpointError, WeightMismatchError

META = {"format": 2, "config": "{}", "data": {}, "text_tokenizer": "null"}


def _state(scale=1.0):
    key = jax.random.key(0)
    return {
        "params": {"a": {"kernel": jax.random.normal(key, (64, 48)) * scale}, "b": jnp.arange(300.0) * scale},
        "step": jnp.asarray(3),
    }


def _abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


@pytest.fixture
def saved(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, _state(step), META | {"step": step})
    checkpoints.close()
    return tmp_path


def test_what_an_interrupted_save_left_is_removed(saved):
    left = saved / "checkpoints" / "2.orbax-checkpoint-tmp" / "state"
    left.mkdir(parents=True)
    (left / "part").write_bytes(bytes(100))
    checkpoints = Checkpoints(saved)
    assert checkpoints.newest() == 3
    checkpoints.close()
    assert all(folder.name.isdigit() for folder in (saved / "checkpoints").iterdir())


def test_a_save_that_failed_is_an_error_once_and_leaves_no_thread(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    monkeypatch.setattr(checkpoint, "write_digests", lambda step: (_ for _ in ()).throw(OSError("full")))
    checkpoints.save(1, _state(), META | {"step": 1})
    with pytest.raises(OSError, match="full"):
        checkpoints.close()
    assert not [thread for thread in threading.enumerate() if "save" in thread.name]
    assert checkpoints._thread._shutdown


def test_the_state_may_be_donated_while_it_is_saved(tmp_path):
    checkpoints, state = Checkpoints(tmp_path), _state(5.0)
    shapes = _abstract(state)
    advance = jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)
    checkpoints.save(7, state, META)
    for _ in range(20):
        state = advance(state)
    checkpoints.wait()
    clock = checkpoints.read_clock()
    assert 0 < clock["checkpoint_blocking"] < 1 and clock["checkpoint_seconds"] > 0 and checkpoints.read_clock() == {}
    found, _ = checkpoints.restore(7, shapes)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(_state(5.0)), strict=True):
        assert np.array_equal(a, b)
    checkpoints.close()


def test_what_is_saved_is_restored(saved):
    checkpoints = Checkpoints(saved)
    assert checkpoints.newest() == 3
    state, meta = checkpoints.restore(3, _abstract(_state()))
    assert meta["step"] == 3
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(_state(3.0)), strict=True):
        assert np.array_equal(a, b)
    params = checkpoint.read_params(saved)
    assert np.array_equal(params["a"]["kernel"], _state(3.0)["params"]["a"]["kernel"])
    checkpoints.close()


def test_every_bit_flip_is_caught(saved):
    step = saved / "checkpoints" / "3"
    files = sorted(f for f in step.rglob("*") if f.is_file() and f.stat().st_size)
    rng = np.random.default_rng(0)
    caught = 0
    for _ in range(100):
        file = files[rng.integers(len(files))]
        data = file.read_bytes()
        at = int(rng.integers(len(data)))
        file.write_bytes(data[:at] + bytes([data[at] ^ (1 << int(rng.integers(8)))]) + data[at + 1 :])
        try:
            checkpoint.verify(step)
        except CorruptCheckpointError as error:
            caught += str(file.name) in str(error)
        file.write_bytes(data)
    checkpoint.verify(step)
    assert caught == 100


def test_damage_is_named_and_the_previous_checkpoint_is_used(saved, caplog):
    step = saved / "checkpoints" / "3"
    biggest = max((f for f in step.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    biggest.write_bytes(biggest.read_bytes()[: biggest.stat().st_size // 2])
    checkpoints = Checkpoints(saved)
    assert checkpoints.newest() == 2
    assert biggest.name in caplog.text
    checkpoints.close()
    with pytest.raises(CorruptCheckpointError, match=biggest.name):
        Checkpoints(saved, use_previous=False).newest()
    assert checkpoint.find(saved).name == "2"
    for other in ("1", "2"):
        shutil.rmtree(saved / "checkpoints" / other, ignore_errors=True)
    with pytest.raises(CorruptCheckpointError, match="no complete checkpoint"):
        checkpoint.find(saved)


def test_missing_extra_and_unfinished_files_are_named(saved):
    step = saved / "checkpoints" / "3"
    (step / "stray").write_text("x")
    with pytest.raises(CorruptCheckpointError, match="stray was not there"):
        checkpoint.verify(step)
    (step / "stray").unlink()
    victim = next(f for f in sorted(step.rglob("*")) if f.is_file() and f.name != checkpoint.DIGESTS)
    victim.rename(saved / "moved")
    with pytest.raises(CorruptCheckpointError, match="is missing"):
        checkpoint.verify(step)
    (saved / "moved").rename(victim)
    (step / checkpoint.DIGESTS).unlink()
    with pytest.raises(CorruptCheckpointError, match="did not finish"):
        checkpoint.verify(step)


def test_many_missing_files_are_counted(saved):
    step = saved / "checkpoints" / "3"
    count = len(json.loads((step / checkpoint.DIGESTS).read_text())["files"])
    shutil.rmtree(step / "state")
    left = sum(file.is_file() for file in step.rglob("*")) - 1
    with pytest.raises(CorruptCheckpointError) as error:
        checkpoint.verify(step)
    assert str(error.value).count(" is missing") == 3
    assert str(error.value).endswith(f"; {count - left - 3} more files differ")


def test_a_rewritten_digest_list_does_not_pass(saved):
    file = saved / "checkpoints" / "3" / checkpoint.DIGESTS
    listed = json.loads(file.read_text())
    listed["files"].popitem()
    file.write_text(json.dumps(listed))
    with pytest.raises(CorruptCheckpointError, match="own digest"):
        checkpoint.verify(file.parent)


def test_weights_from_another_stage_fail_by_name(saved):
    params = {"x": {"kernel": jnp.zeros((64, 48))}, "y": jnp.zeros(300), "z": jnp.ones(2)}
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params)
    initialized = []

    def init(paths):
        initialized.append(set(paths))
        return {path: x for path, x in sharding.flatten(params) if path in paths}

    entry = dict(checkpoint=".", rename=[("a/", "x/"), ("b$", "y")])
    found = checkpoint.init_from(abstract, init, [entry], saved)
    assert np.array_equal(found["x"]["kernel"], _state(3.0)["params"]["a"]["kernel"])
    assert np.array_equal(found["z"], params["z"])
    assert initialized == [{"z"}]  # only what is not read
    with pytest.raises(WeightMismatchError) as error:
        wrong = [("a/", "z/"), ("b$", "x/kernel"), ("c", "d")]
        checkpoint.init_from(abstract, init, [dict(checkpoint=".", rename=wrong)], saved)
    message = str(error.value)
    assert "z/kernel" in message and "(64, 48)" in message and "'c' matches no parameter" in message


def test_no_checkpoint_is_said(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint"):
        checkpoint.find(tmp_path)


def test_two_swapped_steps_are_not_each_other(saved):
    folder = saved / "checkpoints"
    (folder / "3").rename(folder / "x")
    (folder / "2").rename(folder / "3")
    (folder / "x").rename(folder / "2")
    with pytest.raises(CorruptCheckpointError, match="3 holds step 2: the directory was renamed or swapped"):
        checkpoint.verify(folder / "3")
    with pytest.raises(CorruptCheckpointError, match="no complete checkpoint"):
        shutil.rmtree(folder / "1", ignore_errors=True)
        checkpoint.find(saved)


def test_a_digest_list_that_is_no_list_is_named(saved):
    file = saved / "checkpoints" / "3" / checkpoint.DIGESTS
    for content in ("[]", "{}", '{"step": 3, "files": 5}', '{"step": "x", "files": {}}', "\xff"):
        file.write_text(content)
        with pytest.raises(CorruptCheckpointError, match="digests.json is damaged"):
            checkpoint.verify(file.parent)
    file.unlink()
    file.mkdir()
    with pytest.raises(CorruptCheckpointError, match="digests.json is damaged"):
        checkpoint.verify(file.parent)


def test_digests_of_the_first_format_still_verify(saved):
    """They had no step number; their own digest was over the files alone."""
    file = saved / "checkpoints" / "3" / checkpoint.DIGESTS
    files = json.loads(file.read_text())["files"]
    own = hashlib.sha256(json.dumps(files, indent=0, sort_keys=True).encode()).hexdigest()
    file.write_text(json.dumps({"files": files, "self": own}))
    checkpoint.verify(file.parent)


@pytest.mark.parametrize(
    "meta, words",
    [
        (META | {"format": 99}, "newer version .*format 99"),
        ({"format": 2, "config": "{}"}, "lacks data, text_tokenizer"),
        ({"format": 2, "step": 1}, "lacks config, data, text_tokenizer"),
    ],
)
def test_metadata_of_another_version_is_refused(tmp_path, meta, words):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, _state(), meta)
    checkpoints.close()
    with pytest.raises(CheckpointError, match=words):
        checkpoint.read_meta(tmp_path)


def test_another_models_state_is_not_restored(saved):
    checkpoints = Checkpoints(saved)
    other = _state() | {"more": jnp.zeros(3)}
    with pytest.raises(CheckpointError, match="does not fit this config"):
        checkpoints.restore(3, _abstract(other))
    checkpoints.close()


def test_a_corrupt_step_is_written_again(saved):
    step = saved / "checkpoints" / "3"
    biggest = max((f for f in step.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    biggest.write_bytes(biggest.read_bytes()[:-1])
    checkpoints = Checkpoints(saved)
    assert checkpoints.newest() == 2
    checkpoints.save(3, _state(7.0), META | {"step": 3})
    checkpoints.close()
    checkpoint.verify(step)
    assert np.array_equal(checkpoint.read_params(saved)["a"]["kernel"], _state(7.0)["params"]["a"]["kernel"])
