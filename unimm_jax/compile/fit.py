"""Compiles a stage's train step or the generation program for a TPU topology and reports memory and collectives."""

import dataclasses
import math
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from unimm_jax import objectives, sharding, train
from unimm_jax.compile import hardware
from unimm_jax.compile.hardware import GIB, Chip
from unimm_jax.compile.hlo import Collective, count_collectives
from unimm_jax.compile.topology import Topology
from unimm_jax.config import Config
from unimm_jax.errors import ConfigError, OutOfMemoryError, UserError
from unimm_jax.inference.sampling import Decoding, Sampling
from unimm_jax.models.transformer import REMAT

PROMPT_LENGTH, GUIDANCE = 64, 3.0  # of the compiled generation program


@dataclasses.dataclass
class Report:
    """What a compiled program takes on one chip, in bytes and seconds; floating-point operations are of all chips.

    Attributes:
      rows: rows of a micro-batch per device. batch: rows of the whole batch.
      arguments: parameters, optimizer state and batch. temporaries: all buffers, also those never alive together.
      passes: number of times that a step moves its arguments at least; training reads and writes them.
    """

    config: str
    topology: str
    chips: int
    chip: Chip
    rows: int
    batch: int
    arguments: int
    temporaries: int
    peak: int
    collectives: dict[str, Collective]
    model_flops: float
    compile_seconds: float
    passes: int = 2

    @property
    def bounds(self) -> dict[str, float]:
        """Lower bounds on the seconds of a step: by compute, by HBM (`passes` times the arguments), by the links."""
        sent = sum(c.sent for c in self.collectives.values())
        return {
            "compute": self.model_flops / self.chips / self.chip.flops,
            "memory": self.passes * self.arguments / self.chip.bandwidth,
            "links": sent / self.chip.link,
        }

    @property
    def max_mfu(self) -> float:
        """Upper bound on the model FLOPs utilization that follows from `bounds`."""
        return self.bounds["compute"] / max(self.bounds.values())

    def as_dict(self) -> dict[str, Any]:
        """All figures as one object, for --json."""
        found = dataclasses.asdict(self)
        found.pop("chip")
        found |= dict(
            fits=True,
            chip=self.chip.name,
            peak_bytes=found.pop("peak"),
            hbm_bytes=self.chip.memory,
            argument_bytes=found.pop("arguments"),
            temporary_bytes=found.pop("temporaries"),
            bounds_seconds=self.bounds,
            max_mfu=self.max_mfu,
        )
        return found

    def lines(self) -> list[str]:
        """A table to read."""
        share = f"of {self.chip.memory / GIB:.2f} GiB: {self.peak / self.chip.memory:.0%}"
        found = [
            f"{self.config} on {self.topology}: {self.chips} chips, {self.batch} rows ({self.rows} per device)",
            f"  arguments    {self.arguments / GIB:8.2f} GiB   parameters, optimizer state, batch",
            f"  temporaries  {self.temporaries / GIB:8.2f} GiB",
            f"  peak         {self.peak / GIB:8.2f} GiB   {share}",
        ]
        for kind, c in self.collectives.items():
            if c.runs:
                found.append(f"  {kind:18} {c.runs:5} per step {c.bytes / GIB:8.2f} GiB, sends {c.sent / GIB:.2f} GiB")
        found.append(f"  model operations   {self.model_flops / 1e15:.2f} PFLOP per step")
        bounds = ", ".join(f"{name} {seconds * 1e3:.0f} ms" for name, seconds in self.bounds.items())
        found.append(f"  lower bounds of a step: {bounds}; MFU at most {self.max_mfu:.0%}")
        found.append(f"  compiled in {self.compile_seconds:.0f} s")
        return found


# ---- Changes that flags make to a config -----------------------------------------------------------------------------


def with_remat(config: Config, remat: str) -> Config:
    """A config with another rematerialization policy of the language model.

    Raises:
      ConfigError: an unknown policy, or a stage without a language model.
    """
    if remat not in REMAT:
        raise ConfigError(f"--remat={remat}: policies are {', '.join(REMAT)}")
    if "language" not in config.model:
        raise ConfigError(f"--remat={remat}: {config.name} has no language model; override its own sections instead")
    language = dataclasses.replace(config.model["language"], remat=remat)
    return dataclasses.replace(config, model=config.model | {"language": language})


# ---- Train step ------------------------------------------------------------------------------------------------------


def abstract_step(
    config: Config, mesh: jax.sharding.Mesh, text_rows: int = 32_000, codes: int = 16_384, rows: int = 0
) -> tuple[train.Stage, dict[str, jax.ShapeDtypeStruct]]:
    """(stage, abstract batch) with the shapes and shardings of training.

    Args:
      text_rows, codes: sizes of the vocabulary, which training takes from the records.
      rows: rows of a micro-batch per device; 0 takes the config's batch, estimated for packed rows.

    Raises:
      ConfigError: the batch does not divide over the mesh.
    """
    objective = objectives.get(config.objective)
    multiple = sharding.batch_ways(mesh) * config.train.micro_batches
    size = rows * multiple if rows else objective.batch_rows(config, multiple)
    sharding.check_batch(mesh, size, config.train.micro_batches)
    stage = train.build(config, objective.abstract_input(config, text_rows, codes), mesh)
    place = sharding.batch_sharding(mesh)
    spec = objective.batch_spec(config, size)
    return stage, {k: jax.ShapeDtypeStruct(shape, dtype, sharding=place) for k, (shape, dtype) in spec.items()}


def lower_step(
    stage: train.Stage, batch: dict[str, jax.ShapeDtypeStruct], mesh: jax.sharding.Mesh
) -> jax.stages.Lowered:
    """The lowered train step of `abstract_step`."""
    with jax.set_mesh(mesh):
        return stage.step.lower(stage.state, batch)


def compile_step(
    config: Config, topology: Topology, rows: int = 0, text_rows: int = 32_000, codes: int = 16_384
) -> Report:
    """Compiles the train step of a config as training on the topology would.

    Args:
      rows, text_rows, codes: see `abstract_step`.

    Raises:
      OutOfMemoryError: the program needs more memory than a chip has.
    """
    mesh = sharding.make_mesh(config.mesh, topology.devices())
    stage, batch = abstract_step(config, mesh, text_rows, codes, rows)
    _check_arguments((stage.state, batch), mesh)
    flops, size = stage.objective.step_flops(batch), next(iter(batch.values())).shape[0]
    began = time.perf_counter()
    compiled = _compile(lower_step(stage, batch, mesh), mesh)
    seconds, parts = time.perf_counter() - began, config.train.micro_batches
    return _report(compiled, config.name, topology, mesh, size, flops, seconds, parts=parts)


# ---- Generation ------------------------------------------------------------------------------------------------------


def compile_generation(
    config: Config, topology: Topology, rows: int, tensor: int, text_rows: int = 32_000, codes: int = 16_384
) -> Report:
    """Compiles the program that generates images from prompts of `PROMPT_LENGTH` tokens, with guidance.

    Args:
      rows: images at a time per group of chips. tensor: chips per group, over which the model is split.

    Raises:
      UserError: the chips are no multiple of `tensor`, or the stage does not generate images.
      OutOfMemoryError: see `compile_step`.
    """
    if topology.slices > 1:
        raise UserError("--generate uses one slice; leave out --slices")
    devices = topology.devices()
    if len(devices) % tensor:
        raise UserError(f"{topology} has {len(devices)} chips, which is no multiple of --tensor={tensor}")
    if config.objective != "language_modeling" or not config.data.images_per_row:
        raise UserError(f"{config.name} does not generate images from prompts; give one of stage 1, 2 or 3")
    mesh = sharding.make_mesh((len(devices) // tensor, 1, tensor), devices)
    data = objectives.get(config.objective).abstract_input(config, text_rows, codes)
    assert data.vocabulary is not None and data.text_tokenizer is not None
    stage, place = train.build(config, data, mesh), sharding.batch_sharding(mesh)
    max_codes = min(config.model["encoder"].num_patches, config.model["unified"].max_image_tokens)
    fixed = config.model["image_tokenizer"].selection == "all"
    decoding = Decoding(stage.objective, data.vocabulary, data.text_tokenizer, max_codes, fixed)
    batch = rows * mesh.shape["data"]
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
    shapes = [((PROMPT_LENGTH,), dtype) for dtype in (np.int32, bool, np.int32)] + [((0,), np.uint8), ((0,), bool)]
    arguments = [
        stage.state["params"],
        # with guidance, as many prompts without condition follow
        *(jax.ShapeDtypeStruct((2 * batch, *shape), dtype, sharding=place) for shape, dtype in shapes),
        jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=place),
    ]
    run = jax.jit(decoding, static_argnames=("drawing", "sampling"))
    began = time.perf_counter()
    with jax.set_mesh(mesh):
        lowered = run.lower(*arguments, drawing=True, sampling=Sampling(guidance=GUIDANCE))
    compiled = _compile(lowered, mesh)
    length = PROMPT_LENGTH + decoding.image_steps
    flops = 2 * batch * length * config.model["language"].flops(length, data.vocabulary.size)
    seconds, passes = time.perf_counter() - began, 1 + decoding.image_steps
    return _report(compiled, f"generation with {config.name}", topology, mesh, batch, flops, seconds, passes)


# ---- Compiling -------------------------------------------------------------------------------------------------------


def _chip(mesh: jax.sharding.Mesh) -> Chip:
    kind = mesh.devices.flat[0].device_kind
    if kind not in hardware.CHIPS:
        raise UserError(f"there are no figures of the chip {kind!r}; known are {', '.join(hardware.CHIPS)}")
    return hardware.CHIPS[kind]


def _memory(compiled: jax.stages.Compiled) -> Any:
    return compiled.memory_analysis()


def _check_arguments(arguments: Any, mesh: jax.sharding.Mesh) -> None:
    """Refuses arguments that alone exceed a chip's memory, without compiling.

    Raises:
      OutOfMemoryError: they do.
    """
    memory, leaves = _chip(mesh).memory, jax.tree.leaves(arguments)
    needed = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
    if needed > memory:
        raise OutOfMemoryError(_needed("parameters, optimizer state and batch take ", needed, memory))


def _needed(what: str, needed: int, memory: int) -> str:
    return f"{what}{needed / GIB:.2f} GiB, a chip has {memory / GIB:.2f} GiB"


def _compile(lowered: jax.stages.Lowered, mesh: jax.sharding.Mesh) -> jax.stages.Compiled:
    """Compiles a program.

    Raises:
      OutOfMemoryError: the compiler or its report exceeds a chip's memory.
    """
    with jax.set_mesh(mesh):
        try:
            compiled = lowered.compile()
        except Exception as error:
            if "RESOURCE_EXHAUSTED" not in str(error) and "exceeds available" not in str(error):
                raise
            raise OutOfMemoryError(_memory_sentence(str(error))) from None
    memory, peak = _chip(mesh).memory, _memory(compiled).peak_memory_in_bytes
    if peak > memory:
        raise OutOfMemoryError(_needed("it takes ", peak, memory))
    return compiled


def _memory_sentence(message: str) -> str:
    found = re.search(r"Used ([\d.]+[GM]) of ([\d.]+[GM]) hbm", message)
    if found:
        return f"it takes {found[1]}iB, a chip has {found[2]}iB"
    return next((line for line in message.splitlines() if "exceed" in line or "RESOURCE" in line), message)[:300]


def _report(
    compiled: jax.stages.Compiled,
    name: str,
    topology: Topology,
    mesh: jax.sharding.Mesh,
    batch: int,
    flops: float,
    seconds: float,
    passes: int = 2,
    parts: int = 1,
) -> Report:
    memory = _memory(compiled)
    return Report(
        config=name,
        topology=str(topology),
        chips=mesh.size,
        chip=_chip(mesh),
        rows=batch // (sharding.batch_ways(mesh) * parts),
        batch=batch,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
        collectives=count_collectives(compiled.as_text() or ""),
        model_flops=flops,
        compile_seconds=seconds,
        passes=passes,
    )


# ---- What would fit --------------------------------------------------------------------------------------------------


def suggest(
    config: Config, topology: Topology, rows: int, compile_rows: Callable[[Config, Topology, int], Report]
) -> str:
    """Flags with which the step fits. Each attempt is compiled, cheap and likely ones first.

    Args:
      rows: rows per device that did not fit; 0 for the config's own batch.
      compile_rows: compiles a config for a topology with a number of rows per device (0: the config's batch).
    """
    tried = []
    for flags, changed, where, n in _attempts(config, topology, rows):
        try:
            report = compile_rows(changed, where, n)
        except OutOfMemoryError:
            tried.append(flags)
        except ConfigError:  # a mesh or batch that the topology does not divide
            continue
        else:
            more = "; add --largest to find the most rows that fit" if n == 1 else ""
            return f"it fits with {flags} ({report.peak / GIB:.2f} GiB per chip){more}"
    return "nothing that was tried fits: " + ", ".join(tried)


def _attempts(config: Config, topology: Topology, rows: int) -> Iterator[tuple[str, Config, Topology, int]]:
    """(flags, config, topology, rows per device): rematerialization, accumulation, one row, then more chips."""
    remat = ""
    if "language" in config.model and config.model["language"].remat != "full":
        remat, config = "--remat=full ", with_remat(config, "full")
        yield remat.strip(), config, topology, rows
    objective = objectives.get(config.objective)
    data, fsdp, _ = sharding.mesh_shape(config.mesh, topology.chips, topology.slices)
    parts = objective.batch_rows(config, data * fsdp) // (data * fsdp)
    if not rows and objective.accumulates and parts > config.train.micro_batches:
        changed = dataclasses.replace(config, train=dataclasses.replace(config.train, micro_batches=parts))
        yield f"{remat}--config.train.micro_batches={parts}", changed, topology, 0
    if rows != 1:
        yield f"{remat}--rows=1", config, topology, 1
    for larger in topology.larger():
        yield f"{remat}--topology={larger.name} --rows=1", config, larger, 1


def largest(compile_rows: Callable[[int], Report], first: int = 1) -> Report:
    """The report of the largest number of rows per device that fits, found by compiling.

    The next number follows from the memory per row so far. After a number that does not fit, the rest is bisected:
    close to the limit the compiler finds savings, so the memory per row is no guide there.

    Raises:
      OutOfMemoryError: `first` rows do not fit.
    """
    fitted, too_many = [compile_rows(first)], 0
    _progress(fitted[0].rows, f"{fitted[0].peak / GIB:.2f} GiB")
    while too_many != fitted[-1].rows + 1:
        last = fitted[-1]
        if len(fitted) == 1:
            each = (last.peak - last.arguments) / last.rows  # too much: part of it does not grow with the rows
        else:
            each = (last.peak - fitted[0].peak) / (last.rows - first)
        guess = last.rows + max(int((last.chip.memory - last.peak) / max(each, 1)), 1)
        guess = min(guess, (last.rows + too_many) // 2) if too_many else guess
        try:
            fitted.append(compile_rows(guess))
            _progress(guess, f"{fitted[-1].peak / GIB:.2f} GiB")
        except OutOfMemoryError as error:
            too_many = guess
            _progress(guess, str(error))
    return fitted[-1]


def _progress(rows: int, result: str) -> None:
    print(f"{rows} rows per device: {result}", file=sys.stderr, flush=True)
