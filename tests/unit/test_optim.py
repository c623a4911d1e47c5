import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import SIZES, STAGES, has_stage, tiny

from unimm_jax import objectives, optim, resolve, sharding
from unimm_jax.errors import ConfigError


def test_rules_must_match_each_parameter_once():
    paths = ["a/kernel", "a/bias", "b/kernel"]
    assert optim.match_rules(paths, [("a/.*", 1.0), ("b/.*", None)]) == {
        "a/kernel": 1.0, "a/bias": 1.0, "b/kernel": None,
    }  # fmt: skip
    with pytest.raises(ConfigError) as error:
        optim.match_rules(paths, [("a/.*", 1.0), (".*/kernel", 2.0), ("c", 1.0)])
    for part in ("2 rules match a/kernel", "'c' matches no parameter"):
        assert part in str(error.value)
    with pytest.raises(ConfigError, match="no rule matches b/kernel"):
        optim.match_rules(paths, [("a/.*", 1.0)])


# The published U-Net decoders share their U-Net, whose shapes take twelve seconds: the default size is always checked.
SLOW = (("unet_decoder", "lavit-7b"), ("unet_decoder", "illume-7b"))
CASES = [
    pytest.param(stage, size, marks=pytest.mark.slow if (stage, size) in SLOW else ())
    for stage in STAGES
    for size in SIZES
    if has_stage(stage, size)
]


@pytest.mark.parametrize("stage, size", CASES)
def test_every_config_of_every_size_fits_its_model(stage, size):
    config = resolve.parse(resolve.load(f"{stage}:{size}"))
    kind = objectives.get(config.objective)
    objective = kind(config, kind.abstract_input(config))
    params = jax.eval_shape(objective.init, jax.random.key(0))
    trained, frozen, _ = optim.split(params, config.optimizer.rules)
    tx = optim.make(config.optimizer, config.train.steps, trained, optim.split(params, config.optimizer.rules)[2])
    state = jax.eval_shape(tx.init, trained)

    def count(tree):
        return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))

    moments = 2 if config.optimizer.name == "adamw" else 1
    assert count(state) >= moments * count(trained) * 0.99
    assert count(state) <= 2.02 * count(trained) + 1000  # frozen parameters have no optimizer state
    if size == "7b" and stage == "stage2":
        assert 6.5e9 < count(params["language"]) < 7.2e9
        assert not any(p.startswith("encoder") for p, _ in sharding.flatten(trained))
    if size == "7b" and stage == "stage1":
        names = {p for p, _ in sharding.flatten(trained["language"])}
        assert names == {"embed_visual", "head_visual"}


def test_published_rates_are_table_5s():
    def rates(stage):
        config = resolve.parse(resolve.load(f"{stage}:illume-7b"))
        return {
            pattern: config.optimizer.learning_rate * (m or 0) for pattern, m in config.optimizer.rules
        }, config.train

    one, train = rates("stage1")
    assert (train.batch_size, train.steps) == (256, 5000)
    assert one["adapter.*"] == pytest.approx(1e-3) and one["language/(embed|head)_visual"] == pytest.approx(2e-4)
    two, train = rates("stage2")
    assert (train.batch_size, train.steps) == (1024, 15000)
    assert two["adapter.*"] == two["language/.*"] == pytest.approx(5e-5) and two["encoder/.*"] == 0
    three, train = rates("stage3")
    assert (train.batch_size, train.steps) == (1024, 8000)
    assert three["encoder/.*"] == pytest.approx(2e-6) and three["language/.*"] == pytest.approx(2e-5)


def test_lavits_recipe_is_one_stage_with_the_rates_of_its_authors():
    config = resolve.parse(resolve.load("stage2:lavit-7b"))
    rates = {pattern: config.optimizer.learning_rate * (m or 0) for pattern, m in config.optimizer.rules}
    assert rates["language/.*"] == pytest.approx(1e-5) and rates["encoder/.*"] == 0
    assert rates["merger/.*"] == rates["adapter.*"] == pytest.approx(1e-4)
    tasks = config.data.tasks
    assert tasks["text"] == pytest.approx(2 * (tasks["caption"] + tasks["text_to_image"]))
    assert tasks["caption"] / tasks["text_to_image"] == pytest.approx(0.93)
    assert [entry["checkpoint"] for entry in config.init_from] == ["../tokenizer", "../text"]
    for stage in ("stage1", "stage3"):
        with pytest.raises(ConfigError, match=f"has no {stage}; use configs/stage2.py:lavit-7b"):
            resolve.load(f"{stage}:lavit-7b")


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_both_optimizers_learn_a_linear_map(name):
    changes = dict(name=name, learning_rate=0.05, muon_learning_rate=0.2, weight_decay=0.0)
    config = dataclasses.replace(tiny("encoder").optimizer, **changes)
    w = jax.random.normal(jax.random.key(0), (8, 6))
    x = jax.random.normal(jax.random.key(1), (64, 8))
    params = {"layer": {"kernel": jnp.zeros((8, 6)), "bias": jnp.zeros(6)}}
    tx = optim.make(config, 200, params, {"layer/kernel": 1.0, "layer/bias": 1.0})
    state = tx.init(params)
    loss = lambda p: ((x @ p["layer"]["kernel"] + p["layer"]["bias"] - x @ w) ** 2).mean()

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    before = loss(params)
    for _ in range(200):
        params, state = step(params, state)
    assert loss(params) < 0.02 * before


def test_muon_sees_attention_kernels_as_matrices():
    config = tiny("encoder").optimizer
    shapes = {"q": (3, 32, 2, 16), "o": (3, 2, 16, 32), "up": (3, 32, 64)}
    params = {k: {"kernel": jax.random.normal(jax.random.key(i), s)} for i, (k, s) in enumerate(shapes.items())}
    axes = optim._matrix_axes(params)
    assert axes["q"]["kernel"].reduction_axis == 1 and axes["q"]["kernel"].output_axis == (2, 3)
    assert axes["o"]["kernel"].reduction_axis == (1, 2) and axes["o"]["kernel"].output_axis == 3
    assert axes["up"]["kernel"].reduction_axis == 1 and axes["up"]["kernel"].output_axis == 2
    tx = optim.make(config, 10, params, {f"{k}/kernel": 1.0 for k in shapes})
    updates, _ = tx.update(params, tx.init(params), params)
    assert jax.tree.map(lambda x: x.shape, updates) == jax.tree.map(lambda x: x.shape, params)


def test_schedule_warms_up_and_decays():
    config = tiny("encoder").optimizer
    rate = optim.schedule(config, 100, 1.0)
    assert rate(0) == 0 and rate(6) == pytest.approx(1.0) and rate(100) == pytest.approx(config.end)
    constant = dataclasses.replace(config, schedule="constant")
    assert optim.schedule(constant, 100, 1.0)(80) == pytest.approx(1.0)


def test_flatten_is_undone():
    tree = {"a": {"b": jnp.ones(2)}, "e": {0: {"c": jnp.zeros(1)}, 1: jnp.ones(1)}, "d": jnp.ones(3)}
    again = sharding.unflatten(dict(sharding.flatten(tree)))
    assert jax.tree.structure(tree) == jax.tree.structure(again)
