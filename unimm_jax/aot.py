"""Compiles a stage's real train step for a TPU topology, on a machine without a TPU, and says what it will take.

python -m unimm_jax.aot --config=configs/stage2.py:7b --topology=v5e:8x8 [--slices=2] [--rows=2] [--largest] [--json]
python -m unimm_jax.aot --config=configs/stage2.py:7b --topology=v5e:4x4 --generate [--tensor=8]

The second form compiles the program that draws a picture from a prompt, with guidance, the model split over `tensor`
chips and the pictures over the rest.

Needs libtpu (`pip install libtpu`, the version that goes with jaxlib: `pip install "jax[tpu]"`), which compiles for any
named topology. Figures are of one chip. Exits 1 where the step does not fit, naming a change with which it was seen to.
"""

import dataclasses
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import app, flags

from unimm_jax import hardware, sharding, text
from unimm_jax import main as process
from unimm_jax.data import pipeline
from unimm_jax.generate import Decoding, Sampling
from unimm_jax.hardware import GIB, Chip
from unimm_jax.objectives.base import models
from unimm_jax.train import build
from unimm_jax.vocabulary import Vocabulary

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
# Published stages speak LLaMA's words and LaVIT's codes.
WORDS, CODES = 32_000, 16_384
SHAPES = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")  # of v5e and v6e slices


class DoesNotFit(Exception):
    """The compiler found no room; holds its own words."""


@dataclasses.dataclass
class Collective:
    """All collectives of one kind in a step: how many run, and the bytes that they give, on one chip."""

    runs: int = 0
    bytes: int = 0


@dataclasses.dataclass
class Report:
    """What a compiled step takes on one chip; bytes, seconds, floating-point operations of the whole step.

    Attributes:
      passes: how often a step moves its arguments at least; training reads and writes them.
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
        """Seconds a step takes at least: by compute, by HBM (`passes` times the arguments), by the links."""
        moved = sum(c.bytes for c in self.collectives.values())
        return {
            "compute": self.model_flops / self.chips / self.chip.flops,
            "memory": self.passes * self.arguments / self.chip.bandwidth,
            "links": moved / self.chip.link,
        }

    @property
    def ceiling(self) -> float:
        """The share of the chips' peak that the bounds leave to the model's own operations."""
        return self.bounds["compute"] / max(self.bounds.values())

    def as_dict(self) -> dict[str, Any]:
        """One flat object for --json."""
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
            mfu_ceiling=self.ceiling,
        )
        return found

    def lines(self) -> list[str]:
        """The table that a person reads."""
        gib = lambda n: f"{n / GIB:8.2f} GiB"
        found = [
            f"{self.config} on {self.topology}: {self.chips} chips, batch {self.batch} ({self.rows} a device)",
            f"  arguments    {gib(self.arguments)}   parameters, optimiser state, batch",
            f"  temporaries  {gib(self.temporaries)}",
            f"  peak         {gib(self.peak)}   of {self.chip.memory / GIB:.2f} GiB: "
            f"{self.peak / self.chip.memory:.0%}",
        ]
        for kind, c in self.collectives.items():
            if c.runs:
                found.append(f"  {kind:18} {c.runs:5} a step {c.bytes / GIB:8.2f} GiB")
        found.append(f"  model operations   {self.model_flops / 1e15:.2f} PFLOP a step")
        words = ", ".join(f"{name} {seconds * 1e3:.0f} ms" for name, seconds in self.bounds.items())
        found.append(f"  a step takes at least: {words}; MFU at most {self.ceiling:.0%}")
        found.append(f"  compiled in {self.compile_seconds:.0f} s")
        return found


def topology_devices(topology: str, slices: int) -> list[Any]:
    """The devices of a named topology, slice by slice.

    Raises:
      ValueError: libtpu is not installed, or it does not know the name.
    """
    if not _has_libtpu():
        raise ValueError('compiling for a TPU needs its compiler: pip install "jax[tpu]" (libtpu; no TPU is needed)')
    from jax.experimental import topologies

    options = {"num_slices": slices} if slices > 1 else {}
    name = topology.replace("v5p:", "v5:")
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except Exception as error:
        raise ValueError(f"libtpu does not know the topology {topology!r}: {str(error).splitlines()[0]}") from None
    return sorted(found.devices, key=lambda d: (getattr(d, "slice_index", 0), d.id))


def _has_libtpu() -> bool:
    import importlib.util

    return importlib.util.find_spec("libtpu") is not None


def mesh_of(shape: tuple[int, int, int], devices: list[Any], slices: int) -> jax.sharding.Mesh:
    """A mesh whose data axis runs over the slices first."""
    if slices == 1:
        return sharding.make_mesh(shape, devices)
    from jax.experimental import mesh_utils

    data, fsdp, tensor = shape
    inner, outer = (data // slices, fsdp, tensor), (slices, 1, 1)
    array = mesh_utils.create_hybrid_device_mesh(inner, outer, devices=devices)
    return jax.sharding.Mesh(array, sharding.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)


def compile_step(config: Any, topology: str, slices: int = 1, codes: int = CODES) -> Report:
    """Compiles the train step of a config whose mesh and batch are those of the topology.

    Args:
      codes: visual codes of the vocabulary; 0 leaves the language model its words.

    Raises:
      DoesNotFit: the program needs more memory than a chip has.
    """
    mesh = mesh_of(tuple(config.mesh), topology_devices(topology, slices), slices)
    stage = build(config, _stand_in(codes), mesh)
    shapes = pipeline.batch_shapes(config)
    place = sharding.batch_sharding(mesh)
    batch = {k: jax.ShapeDtypeStruct(shape, dtype, sharding=place) for k, (shape, dtype) in shapes.items()}
    where = topology if slices == 1 else f"{slices} slices of {topology}"
    flops = stage.objective.step_flops(batch)
    return _compile(mesh, stage.step, (stage.state, batch), {}, config.name, where, config.train.batch_size, flops)


def compile_generation(config: Any, topology: str, rows: int, tensor: int) -> Report:
    """Compiles what draws pictures from prompts of 64 tokens, with guidance, by a language stage's model.

    Args:
      rows: pictures at a time on each group of chips. tensor: chips of a group, over which the model is split.

    Raises:
      ValueError: the chips are no multiple of `tensor`, or the stage draws nothing. DoesNotFit: see `compile_step`.
    """
    devices = topology_devices(topology, 1)
    if len(devices) % tensor:
        raise ValueError(f"{topology} has {len(devices)} chips, no multiple of --tensor={tensor}")
    if config.objective != "language_modeling" or not config.data.row_pictures:
        raise ValueError(f"{config.name} does not draw from prompts; give one of stage 1, 2 or 3")
    mesh = sharding.make_mesh((len(devices) // tensor, 1, tensor), devices)
    batch = rows * mesh.shape["data"]
    data, patches, prompt = _stand_in(CODES), config.model.unified.budget, 64
    assert data.vocabulary is not None and data.tokenizer is not None
    stage, place = build(config, data, mesh), sharding.batch_sharding(mesh)
    fixed = config.model.tokenizer.get("selection", "argmax") == "all"
    decoding = Decoding(stage.objective, data.vocabulary, data.tokenizer, patches, fixed)
    shaped = lambda shape, dtype: jax.ShapeDtypeStruct((batch, *shape), dtype, sharding=place)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
    arguments = (
        stage.state["params"],
        *(shaped((prompt,), dtype) for dtype in (np.int32, bool, np.int32)),
        *(shaped((0,), dtype) for dtype in (np.uint8, bool)),
        jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=place),
    )
    run = jax.jit(decoding, static_argnames=("drawing", "sampling"))
    options = dict(drawing=True, sampling=Sampling(guidance=3.0))
    length = prompt + decoding.drawing_steps
    flops = 2 * batch * length * models(config)["language"].flops(length, data.vocabulary.size)
    name = f"drawing with {config.name}"
    return _compile(mesh, run, arguments, options, name, topology, batch, flops, passes=1 + decoding.drawing_steps)


def _stand_in(codes: int) -> pipeline.Input:
    return pipeline.Input(None, tokenizer=text.train(["a"], 300), vocabulary=Vocabulary(WORDS, codes))


def _compile(mesh, program, arguments, options, name, topology, batch, flops, passes=2) -> Report:
    with jax.set_mesh(mesh):
        began = time.perf_counter()
        lowered = program.lower(*arguments, **options)
        try:
            compiled = lowered.compile()
        except Exception as error:
            if "RESOURCE_EXHAUSTED" not in str(error) and "exceeds available" not in str(error):
                raise
            raise DoesNotFit(_memory_sentence(str(error))) from None
        seconds = time.perf_counter() - began
    memory = compiled.memory_analysis()
    chip = hardware.CHIPS[mesh.devices.flat[0].device_kind]
    report = Report(
        config=name,
        topology=topology,
        chips=mesh.size,
        chip=chip,
        rows=batch // (mesh.shape["data"] * mesh.shape["fsdp"]),
        batch=batch,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
        collectives=count_collectives(compiled.as_text()),
        model_flops=flops,
        compile_seconds=seconds,
        passes=passes,
    )
    if report.peak > chip.memory:
        raise DoesNotFit(f"{report.peak / GIB:.2f} GiB needed, a chip has {chip.memory / GIB:.2f}")
    return report


def _memory_sentence(message: str) -> str:
    found = re.search(r"Used ([\d.]+[GM]) of ([\d.]+[GM]) hbm", message)
    if found:
        return f"{found[1]}iB needed, a chip has {found[2]}iB"
    return next((line for line in message.splitlines() if "exceed" in line or "RESOURCE" in line), message)[:300]


_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8}


def count_collectives(program: str) -> dict[str, Collective]:
    """Collectives of a compiled program (HLO text), those in loops as often as the loop runs."""
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in program.splitlines():
        start = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
        if start and not line.startswith(" "):
            name = start[2]
            bodies[name] = []
            entry = name if start[1] else entry
        elif name:
            bodies[name].append(line)
    found = {kind: Collective() for kind in COLLECTIVES}
    seen: set[str] = set()  # an asynchronous one has parts in several fusions, all of one channel

    def trips(condition: str, loop: str) -> int:
        told = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop)
        bounds = [int(n) for n in re.findall(r"s32\[\]\S* constant\((\d+)\)", "\n".join(bodies.get(condition, ())))]
        return int(told[1]) if told else max(bounds, default=1)

    def visit(name: str, times: int) -> None:
        for line in bodies.get(name, ()):
            op = re.search(rf"= (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(", line)
            channel = re.search(r"channel_id=(\d+)", line)
            if op and not (channel and channel[0] in seen):
                seen.update([channel[0]] if channel else [])
                shapes = re.findall(r"(\w+)\[([\d,]*)\]", op[1])
                if op[3] and len(shapes) > 1:
                    shapes = shapes[1:2]  # a start gives (operand, result, ...)
                count = lambda axes: math.prod(int(n) for n in axes.split(",") if n)
                size = sum(_BYTES.get(dtype, 4) * count(axes) for dtype, axes in shapes)
                kind = "reduce-scatter" if name.startswith("all-reduce-scatter") else op[2]
                found[kind].runs += times
                found[kind].bytes += times * size
            loop = re.search(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)", line)
            if loop:
                visit(loop[2], times * trips(loop[1], line))
            for called in re.findall(r"(?:calls|to_apply|branch_computations)=\{?%?([\w.\-]+)", line):
                if " while(" not in line and not op:
                    visit(called, times)

    visit(entry, 1)
    return found


def suggest(config: Any, topology: str, slices: int, rows: int) -> str:
    """A change with which the step fits, each tried: recomputation, fewer rows, more chips."""
    remat = config.model.language.remat if "language" in config.model else "full"
    attempts: list[tuple[str, dict[str, Any]]] = []
    if remat != "full":
        attempts.append(("--remat=full", dict(topology=topology, rows=rows, remat="full")))
    less = rows
    while less > 1:
        less //= 2
        attempts.append((f"--rows={less}", dict(topology=topology, rows=less, remat="full")))
    kind, shape = topology.split(":")
    chips = lambda name: math.prod(int(n) for n in name.split("x"))
    for larger in SHAPES if shape.count("x") == 1 else ():
        if chips(larger) > chips(shape):
            name = f"{kind}:{larger}"
            attempts.append((f"--topology={name} --rows=1", dict(topology=name, rows=1, remat="full")))
    for flag, change in attempts:
        where = change.pop("topology")
        try:
            report = compile_step(hardware.apply(config, where, slices, **change), where, slices)
            return f"it fits with {flag} ({report.peak / GIB:.2f} GiB a chip)"
        except DoesNotFit:
            continue
    return "nothing that was tried fits: " + ", ".join(flag for flag, _ in attempts)


def largest(compile_rows: Callable[[int], Report], first: int = 1) -> Report:
    """The report of the largest number of rows a device that fits, each number on the way compiled.

    Guesses where the memory runs out by what a row took so far, and halves what is left open after a miss: close to the
    limit the compiler finds savings, so that what a row takes there says little.

    Raises:
      DoesNotFit: `first` rows do not.
    """
    said = lambda report: print(
        f"{report.rows} rows a device: {report.peak / GIB:.2f} GiB", file=sys.stderr, flush=True
    )
    fitted, too_many = [compile_rows(first)], 0
    said(fitted[0])
    while too_many != fitted[-1].rows + 1:
        last = fitted[-1]
        if len(fitted) == 1:
            each = (last.peak - last.arguments) / last.rows  # too much: not all of it grows with the rows
        else:
            each = (last.peak - fitted[0].peak) / (last.rows - first)
        guess = last.rows + max(int((last.chip.memory - last.peak) / max(each, 1)), 1)
        guess = min(guess, (last.rows + too_many) // 2) if too_many else guess
        try:
            fitted.append(compile_rows(guess))
            said(fitted[-1])
        except DoesNotFit as error:
            too_many = guess
            print(f"{guess} rows a device: {error}", file=sys.stderr, flush=True)
    return fitted[-1]


def command() -> None:
    """Compiles as the flags say; prints the table or the object, exits 1 where it does not fit."""
    f = flags.FLAGS
    jax.config.update("jax_exec_time_optimization_effort", f.effort)
    rows = f.rows or hardware.choose(f.topology).rows
    settle = lambda rows: hardware.apply(CONFIG.value, f.topology, f.slices, rows, f.remat)
    compile_rows = lambda rows: compile_step(settle(rows), f.topology, f.slices, f.codes)
    config = settle(rows)
    if f.generate:
        if f.slices > 1:
            raise ValueError("--generate draws on one slice; leave --slices out")
        compile_rows = lambda rows: compile_generation(settle(rows), f.topology, rows, f.tensor)
    try:
        report = largest(compile_rows, rows) if f.largest else compile_rows(rows)
    except DoesNotFit as error:
        advice = "try --rows or --tensor" if f.generate else suggest(config, f.topology, f.slices, rows)
        if f.json:
            print(
                json.dumps(
                    dict(config=config.name, topology=f.topology, rows=rows, fits=False, why=str(error), mend=advice)
                )
            )
        sys.exit(f"{config.name} does not fit on {f.topology} with {rows} rows a device: {error}; {advice}")
    print(json.dumps(report.as_dict()) if f.json else "\n".join(report.lines()))


def main(_: list[str]) -> None:
    """Runs the command."""
    process.quiet()
    process.run(command)


def prepare_compiler() -> None:
    """Keeps libtpu from looking for a TPU, and JAX from caching programs that it could not read back here."""
    jax.config.update("jax_enable_compilation_cache", False)
    os.environ["JAX_PLATFORMS"] = "cpu"
    for name, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("TPU_ACCELERATOR_TYPE", "v5litepod-16"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("TPU_WORKER_ID", "0"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "true"),
    ):
        os.environ.setdefault(name, value)


if __name__ == "__main__":
    prepare_compiler()
    process.prepare_process()
    from ml_collections import config_flags

    CONFIG = config_flags.DEFINE_config_file("config", None, "The stage's config, configs/STAGE.py[:SIZE].")
    flags.DEFINE_string("topology", "v5e:8x8", "A TPU topology, as v5e:4x4, v5p:2x4x4, v6e:4x4.")
    flags.DEFINE_integer("slices", 1, "Slices of that topology.", lower_bound=1)
    flags.DEFINE_integer("rows", 0, "Rows of a batch on each device; the topology's choice if 0.", lower_bound=0)
    flags.DEFINE_bool("generate", False, "Compile the drawing of pictures from prompts instead of the train step.")
    flags.DEFINE_integer("tensor", 8, "Chips over which --generate splits the model.", lower_bound=1)
    flags.DEFINE_bool("largest", False, "Search for the most rows a device that fit, from --rows on.")
    flags.DEFINE_integer("codes", CODES, "Visual codes of the vocabulary.", lower_bound=0)
    flags.DEFINE_float(
        "effort",
        0.0,
        "The compiler's effort to make the step fast. -1 compiles several times sooner, mostly convolutions, and may "
        "give a step that needs more memory.",
        lower_bound=-1.0,
        upper_bound=1.0,
    )
    flags.DEFINE_string("remat", "", "Remat policy of the language model; the topology's choice if empty.")
    flags.DEFINE_bool("json", False, "Print one object instead of the table.")
    flags.mark_flag_as_required("config")
    app.run(main)
