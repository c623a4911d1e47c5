"""The training loop of every stage, top to bottom.

Order of one turn: save if due, take a batch, step, log. A run is a function of its config: data by (seed, step), noise
by (seed, step), so that a resumed run ends with the same bits as an uninterrupted one.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from unimm_jax import config as config_lib
from unimm_jax import distributed, hardware, import_weights, objectives, optim, sharding, text
from unimm_jax.checkpoint import Checkpoints, init_from, read_meta
from unimm_jax.data import pipeline
from unimm_jax.metrics import Clock, Writer
from unimm_jax.text import TextTokenizer
from unimm_jax.vocabulary import Vocabulary

GIB = 2**30


class NonFinite(RuntimeError):
    """The loss stopped being a number; the message names the step."""


@dataclasses.dataclass
class Stage:
    """A stage ready to run: shapes and shardings of its state and its jitted step; nothing is allocated.

    Attributes:
      state: abstract {params, opt, step, bad_step}, each leaf with its sharding.
      init: key → parameters. init_optimizer: parameters → optimiser state.
      step: (state, batch) → (state, metrics); the state is donated.
    """

    objective: Any
    state: dict[str, Any]
    init: Callable[[jax.Array], Any]
    init_optimizer: Callable[[Any], Any]
    step: Any


def build(config: Any, data: Any, mesh: jax.sharding.Mesh) -> Stage:
    """Shapes first: nothing is ever whole on one device.

    Frozen parameters are kept in the dtype of the activations (unless the objective moves them itself), trained ones in
    float32; what is frozen has no optimiser state.
    """
    objective = objectives.build(config, data)
    rules = [(pattern, value) for pattern, value in config.optimizer.rules]

    def init(key: jax.Array) -> Any:
        trained, frozen, _ = optim.split(objective.init(key), rules)
        cast = lambda path, x: x if path in objective.moved else x.astype(objective.dtype)
        frozen = {path: cast(path, x) for path, x in sharding.flatten(frozen)}
        return sharding.unflatten(dict(sharding.flatten(trained)) | frozen)

    abstract = jax.eval_shape(init, jax.random.key(0))
    trained, _, multipliers = optim.split(abstract, rules)
    tx = optim.make(config.optimizer, config.train.steps, trained, multipliers)
    places = sharding.param_shardings(objective.abstract, mesh)
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    opt = jax.eval_shape(tx.init, trained)
    opt_places = sharding.like_params(opt, trained, optim.split(places, rules)[0], mesh)
    scalar = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
    state = {
        "params": jax.tree.map(_abstract, abstract, places),
        "opt": jax.tree.map(_abstract, opt, opt_places),
        "step": scalar,
        "bad_step": scalar,
    }

    def step_fn(state: dict[str, Any], batch: dict[str, jax.Array]) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        trained, frozen, _ = optim.split(state["params"], rules)
        key = jax.random.fold_in(jax.random.key(config.seed), state["step"])

        def loss_of(trained):
            return objective.loss(optim.join(trained, frozen), batch, key, state["step"])

        (loss, aux), grads = jax.value_and_grad(loss_of, has_aux=True)(trained)
        updates, opt = tx.update(grads, state["opt"], trained)
        trained = optax.apply_updates(trained, updates)
        flat = dict(sharding.flatten(optim.join(trained, frozen))) | aux.updates
        bad = jnp.where((state["bad_step"] < 0) & ~jnp.isfinite(loss), state["step"] + 1, state["bad_step"])
        metrics = {"loss": loss} | aux.metrics | {"grad_norm": optim.global_norm(grads)}
        params = sharding.unflatten(flat)
        return {"params": params, "opt": opt, "step": state["step"] + 1, "bad_step": bad}, metrics

    state_places = jax.tree.map(lambda x: x.sharding, state)
    step = jax.jit(step_fn, donate_argnums=0, out_shardings=(state_places, replicated))
    return Stage(objective, state, init, lambda params: tx.init(optim.split(params, rules)[0]), step)


def train(config: Any, workdir: str | pathlib.Path) -> dict[str, float]:
    """Trains one stage to its last step and returns the last logged metrics.

    Goes on from the workdir's newest complete checkpoint if there is one. On SIGTERM saves at once and returns.

    Raises:
      ConfigError: the config is wrong. ValueError: data, weights or mesh do not fit. NonFinite: the loss diverged.
    """
    # ---- Settings and data -------------------------------------------------------------------------------------
    began, clock = time.perf_counter(), Clock()
    workdir = pathlib.Path(workdir)
    refuse_what_does_not_fit(config)
    config_lib.check(config, workdir)
    config = config.copy_and_resolve_references()
    if "records" in config.data:
        config.data.records = str(config_lib.resolve(config.data.records, workdir))
    workdir.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(workdir, config.train.keep, config.train.use_previous_checkpoint)
    newest = checkpoints.newest()
    if jax.process_index() == 0:
        (workdir / "config.json").write_text(config.to_json_best_effort(indent=1))
    data = pipeline.open_input(config, _tokenizer_of(workdir if newest is not None else None))
    mesh = sharding.make_mesh(tuple(config.mesh))
    stage = build(config, data, mesh)
    objective, places = stage.objective, jax.tree.map(lambda x: x.sharding, stage.state)

    # ---- Start: own checkpoint, else other stages' weights, else from nothing ----------------------------------
    state: dict[str, Any]
    with jax.set_mesh(mesh):
        size = config.train.batch_size
        open_batches = lambda: data.iterate(size, sharding.local_rows(mesh, size))
        batches, seconds_before = open_batches(), 0.0
        if newest is not None:
            state, meta = checkpoints.restore(newest, stage.state)
            if meta["data"] != _jsonable(data.header):
                raise ValueError(
                    f"the data of {workdir} changed since step {newest} was saved (sources, records or tokenizer "
                    "differ); restore the data or start in a new workdir"
                )
            batches.set_state(json.loads(meta["iterator"]))
            seconds_before = meta["seconds"]
            print(f"{config.name}: goes on from step {newest}", flush=True)
        else:
            params = jax.jit(stage.init, out_shardings=places["params"])(jax.random.key(config.seed))
            opener = functools.partial(import_weights.open_source, vocabulary=data.vocabulary)
            params = init_from(params, places["params"], [dict(e) for e in config.init_from], workdir, opener)
            params = objective.prepare(params, (sharding.put_batch(batch, mesh, size) for batch in open_batches()))
            opt = jax.jit(stage.init_optimizer, out_shardings=places["opt"])(params)
            zero = jax.device_put(jnp.asarray(0, jnp.int32), places["step"])
            state = {"params": params, "opt": opt, "step": zero, "bad_step": zero - 1}
        start = int(state["step"])

        # ---- The loop ------------------------------------------------------------------------------------------
        writer = Writer(workdir, config.name, config.train.steps, start, jax.process_index() == 0)
        rate = optim.schedule(config.optimizer, config.train.steps, config.optimizer.rate)
        of_peak = hardware.share_of_peak(stage.objective, config, jax.devices())
        last: dict[str, float] = {}
        metrics: dict[str, jax.Array] = {}
        host_batch: dict[str, np.ndarray] = {}

        def save(step: int) -> None:
            if (bad := int(state["bad_step"])) >= 0:
                raise NonFinite(
                    f"{config.name}: the loss is not finite since step {bad}; the last good checkpoint is kept. Lower "
                    "config.optimizer.rate or look at the data of that step"
                )
            meta = {
                "config": config.to_json_best_effort(),
                "data": _jsonable(data.header),
                "iterator": json.dumps(batches.get_state()),
                "tokenizer": json.dumps(data.tokenizer.payload if data.tokenizer else None),
                "step": step,
                "seconds": seconds_before + time.perf_counter() - began,
            }
            checkpoints.save(step, state, meta)

        loop_began, compile_seconds = time.perf_counter(), 0.0
        watchdog = distributed.Watchdog(config.train.watchdog)
        closing = contextlib.closing
        with closing(checkpoints), closing(writer), closing(watchdog), distributed.stop_signal() as stop:
            step, stopped = start, False
            while step < config.train.steps and not stopped:
                if step > start and step % config.train.checkpoint_every == 0:
                    jax.block_until_ready(state["bad_step"])
                    with clock.on("checkpoint"):
                        save(step)
                # while devices still work on earlier steps, waiting for a batch costs nothing
                with clock.on("input" if metrics else "start", counts=functools.partial(_done, metrics)):
                    host_batch = next(batches)
                state, metrics = stage.step(state, sharding.put_batch(host_batch, mesh, size))
                step += 1
                watchdog.beat()
                stopped = stop(step)
                if step == start + 1:
                    jax.block_until_ready(state["step"])
                    compile_seconds = clock.whole["compile"] = time.perf_counter() - loop_began
                    writer.count_from(step)
                    clock.read()
                if step % config.train.log_every == 0 or step == config.train.steps:
                    values = dict(metrics) | {"learning_rate": rate(step)} | clock.read() | checkpoints.read_clock()
                    if step <= start + config.train.log_every:
                        values["compile_seconds"] = compile_seconds
                    amounts = {k: n * jax.process_count() for k, n in objective.amounts(host_batch).items()}
                    last = writer.scalars(step, values, amounts | ({"mfu": of_peak} if of_peak else {}))
                    if int(state["bad_step"]) >= 0:
                        save(step)  # raises, naming the step
                drawn = step % config.train.picture_every == 0 or step == config.train.steps
                if drawn and jax.process_count() == 1:  # what is drawn must be whole on one process
                    jax.block_until_ready(state["step"])
                    with clock.on("pictures"), writer.paused():
                        for name, image in objective.pictures(state["params"], host_batch).items():
                            writer.picture(step, name, image)
            if step > start:
                save(step)
            checkpoints.wait()
            if step == config.train.steps and jax.process_index() == 0:
                seconds = round(seconds_before + time.perf_counter() - began, 1)
                (workdir / "done.json").write_text(json.dumps({"steps": step, "seconds": seconds}))
    if stopped:
        print(f"{config.name}: stopped by SIGTERM, saved step {step}; run the same command again to go on", flush=True)
    return last


def _done(arrays: dict[str, Any]) -> bool:
    return all(x.is_ready() for x in arrays.values())


def _abstract(leaf: Any, place: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)


def _jsonable(header: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps({k: v for k, v in header.items() if k != "text_tokenizer"}))


def _tokenizer_of(workdir: pathlib.Path | None) -> TextTokenizer | None:
    """The text tokenizer that travels in a workdir's checkpoint, if any."""
    payload = json.loads(read_meta(workdir)["tokenizer"]) if workdir is not None else None
    return TextTokenizer(payload) if payload else None


def refuse_what_does_not_fit(config: Any) -> None:
    """Raises with one sentence where parameters, gradients and moments alone exceed the memory there is.

    Needs no data and builds nothing: vocabulary sizes are the published ones.
    """
    if config.size == "laptop":
        return
    stand_in = pipeline.Input(None, tokenizer=text.train(["a"], 300), vocabulary=Vocabulary(32000, 16384))
    params = jax.eval_shape(objectives.build(config, stand_in).init, jax.random.key(0))
    trained = optim.split(params, [(p, v) for p, v in config.optimizer.rules])[0]
    size = lambda tree: sum(int(np.prod(x.shape)) * 4 for x in jax.tree.leaves(tree))
    needed = size(params) + 3 * size(trained)
    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        there, what = stats["bytes_limit"] * jax.device_count(), f"{jax.device_count()} × {device.device_kind}"
    else:
        there, what = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "this machine"
    if needed > 0.9 * there:
        raise config_lib.ConfigError(
            f"{config.name} needs {needed / GIB:.0f} GiB for parameters, gradients and optimiser state, {what} has "
            f"{there / GIB:.0f} GiB: use the size laptop (--config=configs/{config.stage}.py:laptop) or one_gpu, "
            "or more devices"
        )
