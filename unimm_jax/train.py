"""The training loop of every stage, top to bottom.

Order of one iteration: save, evaluate, take a batch, step, log. A run is a function of its config: data and noise are
functions of (seed, step), so a resumed run ends with the same bits as an uninterrupted one.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import pathlib
import time
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax

from unimm_jax import (
    distributed,
    environment,
    evals,
    legacy,
    memory,
    objectives,
    optim,
    process,
    resolve,
    sharding,
    storage,
    wandb_run,
)
from unimm_jax.checkpoint import Checkpoints, init_from, read_meta, refuse_s3
from unimm_jax.compile import hardware
from unimm_jax.config import Config
from unimm_jax.data.pipeline import Input
from unimm_jax.errors import CheckpointError, NonFiniteLossError
from unimm_jax.evals.base import Context
from unimm_jax.interop import importer
from unimm_jax.metrics import Clock, Profiler, WindowMean, Writer, parameter_table, read
from unimm_jax.objectives.accumulation import key_of_part, value_and_grad
from unimm_jax.runcard import STEPS, RunCard
from unimm_jax.text_tokenizer import TextTokenizer


@dataclasses.dataclass
class Stage:
    """A stage ready to run: shapes and shardings of its state and its jitted step; nothing is allocated.

    Attributes:
      state: abstract {params, opt, step, bad_step}, each leaf with its sharding.
      init: key → parameters. init_optimizer: parameters → optimizer state.
      step: (state, batch) → (state, metrics); the state is donated.
      multipliers: path of each trained parameter → multiplier of the learning rate.
    """

    objective: Any
    state: dict[str, Any]
    init: Callable[[jax.Array], Any]
    init_optimizer: Callable[[Any], Any]
    step: Any
    multipliers: dict[str, float]


def build(config: Config, data: Input, mesh: jax.sharding.Mesh) -> Stage:
    """Builds a stage from shapes; no parameter is ever whole on one device.

    Frozen parameters have the dtype of the activations (unless the objective updates them itself), trained ones are
    float32. Frozen parameters have no optimizer state.
    """
    objective = objectives.get(config.objective)(config, data)
    rules = list(config.optimizer.rules)

    def init(key: jax.Array) -> Any:
        trained, frozen, _ = optim.split(objective.init(key), rules)
        found = dict(sharding.flatten(trained))
        for path, x in sharding.flatten(frozen):
            found[path] = x if path in objective.non_gradient_params else x.astype(objective.dtype)
        return sharding.unflatten(found)

    abstract = jax.eval_shape(init, jax.random.key(0))
    trained, _, multipliers = optim.split(abstract, rules)
    tx = optim.make(config.optimizer, config.train.steps, trained, multipliers)
    param_shardings = sharding.param_shardings(objective.abstract, mesh)
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    opt = jax.eval_shape(tx.init, trained)
    opt_shardings = sharding.like_params(opt, trained, optim.split(param_shardings, rules)[0], mesh)
    scalar = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
    state = {
        "params": jax.tree.map(_abstract, abstract, param_shardings),
        "opt": jax.tree.map(_abstract, opt, opt_shardings),
        "step": scalar,
        "bad_step": scalar,
    }

    parts = config.train.micro_batches

    def step_fn(state: dict[str, Any], batch: dict[str, jax.Array]) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        trained, frozen, _ = optim.split(state["params"], rules)
        key = jax.random.fold_in(jax.random.key(config.seed), state["step"])

        def loss_of(trained: Any, rows: Any, part: Any) -> Any:
            return objective.loss(optim.join(trained, frozen), rows, key_of_part(key, part, parts), state["step"])

        (loss, aux), grads = value_and_grad(loss_of, trained, batch, parts)
        updates, opt = tx.update(grads, state["opt"], trained)
        trained = optax.apply_updates(trained, updates)
        flat = dict(sharding.flatten(optim.join(trained, frozen))) | aux.updates
        bad = jnp.where((state["bad_step"] < 0) & ~jnp.isfinite(loss), state["step"] + 1, state["bad_step"])
        metrics = {"loss": loss} | aux.metrics | {"grad_norm": optim.global_norm(grads)}
        params = sharding.unflatten(flat)
        return {"params": params, "opt": opt, "step": state["step"] + 1, "bad_step": bad}, metrics

    state_shardings = jax.tree.map(lambda x: x.sharding, state)
    step = jax.jit(step_fn, donate_argnums=0, out_shardings=(state_shardings, replicated))
    return Stage(objective, state, init, lambda params: tx.init(optim.split(params, rules)[0]), step, multipliers)


def train(config: Config, workdir: str | pathlib.Path, first_steps: int | None = None) -> dict[str, float] | None:
    """Trains one stage to its last step and returns the last logged metrics.

    Resumes from the workdir's newest complete checkpoint if there is one. On SIGTERM saves at once and returns None.

    Args:
      first_steps: end after so many steps of the run without a checkpoint (`unimm_jax.replay`); None trains to the end.

    Raises:
      ConfigError, DataError, CheckpointError, WeightMismatchError: config, data or weights are wrong or do not fit.
      OutOfMemoryError: the parameters do not fit the devices. NonFiniteLossError: the loss diverged.
    """
    # ---- Settings and data -------------------------------------------------------------------------------------
    began, clock = time.perf_counter(), Clock()
    workdir = storage.path(workdir)
    refuse_s3(workdir)
    distributed.check_shared(workdir)
    needs = memory.check_devices(config)
    resolve.check_paths(config, workdir)
    wandb_run.check(config.train.wandb)
    environment.warn(config, workdir, needs.checkpoint)
    if hasattr(config.data, "records"):
        records = str(storage.at(workdir, config.data.records))
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, records=records))
    mesh = sharding.make_mesh(config.mesh)
    workdir.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(workdir, config.train.keep, config.train.use_previous_checkpoint)
    newest = checkpoints.newest()
    objective_class = objectives.get(config.objective)
    data = objective_class.open_input(config, _tokenizer_of(workdir if newest is not None else None))
    share = functools.partial(sharding.local_rows, mesh)
    multiple = sharding.batch_ways(mesh) * config.train.micro_batches
    size = data.size(0, multiple)
    sharding.check_batch(mesh, size, config.train.micro_batches)
    stage = build(config, data, mesh)
    objective, shardings = stage.objective, jax.tree.map(lambda x: x.sharding, stage.state)
    table = parameter_table(stage.state["params"], stage.multipliers)
    if jax.process_index() == 0:
        print(f"{config.name}: {table.splitlines()[-1]}, mesh {dict(mesh.shape)}", flush=True)
        for note in data.notes(multiple):
            print(f"{config.name}: {note}", flush=True)

    # ---- Start: own checkpoint, else other stages' weights, else from nothing ----------------------------------
    state: dict[str, Any]
    with jax.set_mesh(mesh):
        open_batches = lambda: data.iterate(share, multiple)
        batches, seconds_before, window = open_batches(), 0.0, WindowMean()
        if newest is not None:
            state, meta = checkpoints.restore(newest, stage.state)
            _check_same_data(meta["data"], data.header, workdir, newest)
            batches.set_state(json.loads(meta["iterator"]))
            seconds_before, clock.before = meta["seconds"], meta.get("spent", {})
            window.restore(meta.get("window", {"sums": {}, "steps": 0}), shardings["step"])
            if jax.process_index() == 0:
                print(f"{config.name}: resumes from step {newest}", flush=True)
        else:
            open_weights = functools.partial(importer.open_weights, config=config, vocabulary=data.vocabulary)
            init = functools.partial(_init, stage, config.seed)
            params = init_from(stage.state["params"], init, config.init_from, workdir, open_weights)
            params = objective.prepare(params, (sharding.put_batch(batch, mesh, size) for batch in open_batches()))
            opt = jax.jit(stage.init_optimizer, out_shardings=shardings["opt"])(params)
            zero = jax.device_put(jnp.asarray(0, jnp.int32), shardings["step"])
            state = {"params": params, "opt": opt, "step": zero, "bad_step": zero - 1}
        start = int(state["step"])
        if jax.process_index() == 0 and (start < config.train.steps or newest is None):
            storage.write_whole(workdir / "config.json", config.to_json().encode())
            storage.write_whole(workdir / "parameters.txt", f"{table}\n".encode())
        done, is_done = workdir / "done.json", False
        if jax.process_index() == 0:
            is_done = done.exists() and json.loads(done.read_text()).get("steps") == start
        card = RunCard(workdir, config, mesh, data, start, is_done)

        # ---- The loop ------------------------------------------------------------------------------------------
        open_wandb = functools.partial(wandb_run.WandbRun, config, workdir) if config.train.wandb else None
        writer = Writer(workdir, config.name, config.train.steps, start, jax.process_index() == 0, open_wandb)
        evaluators = {
            name: (entry, evals.get(entry["type"])(evals.options_of(entry))) for name, entry in config.evals.items()
        }
        rate = optim.schedule(config.optimizer, config.train.steps, config.optimizer.learning_rate)
        of_peak = hardware.share_of_peak(objective, objective_class.batch_spec(config, size), jax.devices())
        last: dict[str, float] = {}
        warned: set[str] = set()
        metrics: dict[str, jax.Array] = {}
        traced = config.train.profile if jax.process_index() == 0 else 0
        profiler = Profiler(writer.folder / "profile", start, config.train.profile_start, traced)

        # a run that was stopped between a step and its evaluation evaluates when it resumes
        there = set()
        if jax.process_index() == 0:
            there = {row["eval"] for row in read(workdir, "evals.jsonl") if row["step"] == start}
        missing = distributed.of_first_process([name not in there and not is_done for name in evaluators])
        recorded = {(start, name) for name, is_missing in zip(evaluators, missing, strict=True) if not is_missing}

        def evaluate(step: int) -> None:
            due = [n for n, (entry, _) in evaluators.items() if _is_due(entry["every"], step, config.train.steps)]
            due = [n for n in due if (step, n) not in recorded]
            for name in due:
                jax.block_until_ready(state["bad_step"])
                with clock.on("evaluation"), writer.paused():
                    context = Context(
                        config, objective, state["params"], step, mesh, workdir, data.header, data.text_tokenizer
                    )
                    try:
                        result = evaluators[name][1].run(context)
                        writer.evaluation(step, name, result)
                        card.evaluated(name, evaluators[name][0], result.settings)
                    except Exception as error:  # training does not stop for a bug in an evaluation
                        if jax.process_count() > 1:  # the others may have evaluated: they neither wait nor save
                            raise
                        if process.explain(error) is not None:  # a missing file: it is evaluated after the restart
                            save(step)
                            raise
                        logging.exception("%s: the evaluation %s failed; training continues", config.name, name)
                    watchdog.beat()
            if due:
                writer.flush()

        def save(step: int) -> None:
            card.write()
            if (bad := int(state["bad_step"])) >= 0:
                raise NonFiniteLossError(
                    f"{config.name}: the loss is not finite since step {bad}; the last good checkpoint is kept. Lower "
                    "config.optimizer.learning_rate or look at the data of that step"
                )
            meta = {
                "format": legacy.FORMAT,
                "config": config.to_json(),
                "data": _jsonable(data.header),
                "iterator": json.dumps(batches.get_state()),
                "text_tokenizer": json.dumps(data.text_tokenizer.payload if data.text_tokenizer else None),
                "step": step,
                "window": window.save(),
                "seconds": seconds_before + time.perf_counter() - began,
                "spent": clock.totals(),
            }
            writer.flush()  # before the checkpoint, so that it has the lines of every step up to it
            checkpoints.save(step, state, meta)

        loop_began, compile_seconds = time.perf_counter(), 0.0
        clock.prepared = loop_began - began
        watchdog = distributed.Watchdog(config.train.watchdog)
        closing = contextlib.closing
        with (
            closing(checkpoints),
            closing(writer),
            closing(watchdog),
            closing(profiler),
            distributed.stop_signal() as stop,
        ):
            step, stopped = start, False
            end = config.train.steps if first_steps is None else min(first_steps, config.train.steps)
            while step < end and not stopped:
                if step > start and step % config.train.checkpoint_every == 0:
                    jax.block_until_ready(state["bad_step"])
                    with clock.on("checkpoint"):
                        save(step)
                if step > 0:
                    evaluate(step)  # after the checkpoint: if it fails, no step is lost
                # while devices still work on earlier steps, waiting for a batch costs nothing
                with clock.on("input" if metrics else "prepare", counts=functools.partial(_done, metrics)):
                    host_batch, rows = next(batches), data.size(step, multiple)
                batch = sharding.put_batch(host_batch, mesh, rows)
                with profiler.step(step), jax.transfer_guard("disallow"):
                    state, metrics = stage.step(state, batch)
                    window.add(metrics)
                step += 1
                if step <= STEPS:
                    card.add(step, host_batch, share(rows), metrics)
                watchdog.beat()
                stopped = stop(step)
                if step == start + 1:
                    jax.block_until_ready(state["step"])
                    compile_seconds = time.perf_counter() - loop_began
                    clock.whole["compile"] = compile_seconds - sum(clock.whole.values())
                    writer.count_from(step)
                    clock.read()
                if step % config.train.log_every == 0 or step == config.train.steps:
                    values = window.read() | {"learning_rate": rate(step)} | clock.read() | checkpoints.read_clock()
                    if step <= start + config.train.log_every:
                        values["compile_seconds"] = compile_seconds
                    counts = data.counts(step - 1)
                    values["examples_per_step"] = counts["examples"]
                    if replaced := data.replaced_share(step - 1):
                        values["replaced_share"] = replaced
                    last = writer.scalars(step, values, counts | ({"mfu": of_peak} if of_peak else {}))
                    new = {k: text for k, text in objective.warnings(step, last).items() if k not in warned}
                    warned |= set(new)
                    for text in new.values() if jax.process_index() == 0 else ():
                        print(f"{config.name}: warning: {text}", flush=True)
                    if step >= STEPS:  # of the run card; the values of this step are there already
                        card.write()
                    if int(state["bad_step"]) >= 0:
                        save(step)  # raises, naming the step
                is_drawn = step % config.train.image_every == 0 or step == config.train.steps
                if is_drawn and jax.process_count() == 1:  # images need whole parameters on one process
                    jax.block_until_ready(state["step"])
                    with clock.on("images"), writer.paused():
                        for name, image in objective.visualize(state["params"], host_batch).items():
                            writer.image(step, name, image)
            if first_steps is not None:
                card.write()
                return last
            if step > start:
                save(step)
            if step == config.train.steps:
                evaluate(step)
            checkpoints.wait()
            card.finish(read(writer.folder))
            if step == config.train.steps and jax.process_index() == 0:
                seconds = round(seconds_before + time.perf_counter() - began, 1)
                ended = {"steps": step, "seconds": seconds, "spent": clock.totals()}
                storage.write_whole(done, json.dumps(ended).encode())
    if stopped:
        print(f"{config.name}: stopped by SIGTERM, saved step {step}; run the same command again to resume", flush=True)
        return None
    return last


def _done(arrays: dict[str, Any]) -> bool:
    return all(x.is_ready() for x in arrays.values())


def _is_due(every: int, step: int, steps: int) -> bool:
    return step == steps or bool(every and step % every == 0)


def _init(stage: Stage, seed: int, paths: Collection[str]) -> dict[str, jax.Array]:
    """Some of the initialized parameters, by path. The compiler removes what only the others need."""
    where = {path: leaf.sharding for path, leaf in sharding.flatten(stage.state["params"]) if path in paths}

    def init(key: jax.Array) -> dict[str, jax.Array]:
        return {path: x for path, x in sharding.flatten(stage.init(key)) if path in paths}

    return jax.jit(init, out_shardings=where)(jax.random.key(seed))


def _abstract(leaf: Any, where: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)


def _jsonable(header: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps({k: v for k, v in header.items() if k != "text_tokenizer"}))


def _check_same_data(saved: dict[str, Any], header: dict[str, Any], workdir: pathlib.Path, step: int) -> None:
    """Refuses data that differs from that of the checkpoint. Keys that an older version did not save are not compared.

    Raises:
      CheckpointError: names what differs.
    """
    saved, now = legacy.header(saved), _jsonable(header)
    if "order" in now and "order" not in saved:
        raise CheckpointError(
            f"{workdir} was written by a version that counted batches in packed rows, in another order of the data; "
            "start in a new workdir, with init_from to keep its weights"
        )
    changed = sorted(key for key, value in saved.items() if now.get(key) != value)
    if changed:
        raise CheckpointError(
            f"the data of {workdir} changed since step {step} was saved ({', '.join(changed)} differ); restore the "
            "data or start in a new workdir (runs of version 0.1 on own data resume with --config.data.held_out=0)"
        )


def _tokenizer_of(workdir: pathlib.Path | None) -> TextTokenizer | None:
    """The text tokenizer of a workdir's checkpoint, if any."""
    payload = json.loads(read_meta(workdir)["text_tokenizer"]) if workdir is not None else None
    return TextTokenizer(payload) if payload else None
