"""Time and memory until the first row of a plan over 100 million records.

python -m benchmarks.plan_scale [--records=100_000_000] [--batch=1024] [--seq_len=2048]

Writes the index of synthetic records (about 4 GB at 100 million) to a temporary directory: half of them captions of
5 to 40 tokens, the rest texts, conversations and edits. Opens it as training does, in a new process, and prints the
seconds until the first row is known, its peak memory, and the time to plan the following steps. Then checks that 1 and
4 processes read the same rows.
"""

import argparse
import dataclasses
import json
import pathlib
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np

from unimm_jax import resolve, text_tokenizer
from unimm_jax.config import Config
from unimm_jax.data import outlines, pipeline
from unimm_jax.data.packing import example_size
from unimm_jax.data.plan import Plan
from unimm_jax.data.records import FORMAT

CHUNK = 10_000_000
KINDS = (  # share, outline codes, images
    (0.5, (outlines.CAPTION,), 1),
    (0.2, (outlines.TEXT,), 0),
    (0.2, (outlines.USER, outlines.IMAGE, outlines.PART, outlines.ASSISTANT, outlines.PART), 1),
    (0.1, (outlines.INSTRUCTION,), 2),
)


def write(root: pathlib.Path, count: int) -> None:
    """Writes the index and the header of `count` synthetic records; there are no blocks behind them."""
    (root / "index").mkdir()
    rng = np.random.default_rng(0)
    kinds = rng.choice(len(KINDS), count, p=[share for share, _, _ in KINDS]).astype(np.uint8)
    texts = np.array([sum(code not in NOT_TEXT for code in codes) for _, codes, _ in KINDS])
    numbers = {
        "kept": np.array([images for _, _, images in KINDS]),
        "texts": texts,
        "outlines": np.array([len(codes) for _, codes, _ in KINDS]),
    }
    for name, each in numbers.items():
        ends = np.lib.format.open_memmap(root / "index" / f"{name}_ends.npy", "w+", np.int64, (count + 1,))
        np.cumsum(each[kinds], out=ends[1:])
        total, dtype = int(ends[-1]), dict(kept=np.uint16, texts=np.uint32, outlines=np.uint8)[name]
        values = np.lib.format.open_memmap(root / "index" / f"{name}.npy", "w+", dtype, (total,))
        if name == "outlines":
            table = [np.array(codes, np.uint8) for _, codes, _ in KINDS]
            for start in range(0, count, CHUNK):
                part = np.concatenate([table[kind] for kind in kinds[start : start + CHUNK].tolist()])
                values[ends[start] : ends[start] + len(part)] = part
        else:
            low, high = (40, 140) if name == "kept" else (5, 40)
            for start in range(0, total, CHUNK):
                values[start : start + CHUNK] = rng.integers(low, high, min(CHUNK, total - start))
    np.save(root / "index" / "source.npy", np.zeros(count, np.uint16))
    tokenizer = text_tokenizer.train(["a circle", "a red square"], 300)
    header = dict(records=count, records_format=FORMAT, sources="synthetic", text_tokenizer=tokenizer.payload)
    header |= dict(num_patches=256, codes=16_384, positions="order", selection="argmax", image_size=224, blocks=0)
    (root / "header.json").write_text(json.dumps(header))


NOT_TEXT = (outlines.IMAGE, outlines.SYSTEM, outlines.USER, outlines.ASSISTANT)


def config_of(root: pathlib.Path, batch: int, seq_len: int) -> Config:
    """Stage 2 at the published size, on the synthetic records."""
    given = resolve.load("stage2:7b")
    given.train.batch_size, given.data.seq_len, given.data.records = batch, seq_len, str(root)
    return resolve.parse(given)


def opened(root: pathlib.Path, batch: int, seq_len: int) -> Plan:
    """The plan, as a language stage opens it."""
    config = config_of(root, batch, seq_len)
    return pipeline.packed_input(config).rows.plan


def first_row(root: pathlib.Path, batch: int, seq_len: int) -> dict[str, float]:
    """Measures the plan; run in a process of its own, so that the peak memory is that of the plan."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    plan = opened(root, batch, seq_len)
    row = plan.rows(0)[0]
    seconds = time.perf_counter() - began
    assert row
    began, steps = time.perf_counter(), 2 * plan.window
    rows = [plan.rows(step) for step in range(1, steps + 1)]
    each = (time.perf_counter() - began) / steps
    tokens = [
        sum(example_size(plan.records, e, plan.packing, plan.layout)[0] for row in found for e in row)
        for found in rows[:4]
    ]
    assert all(sum(map(len, found)) == plan.batch for found in rows)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return dict(
        seconds=seconds,
        before_gib=before / 2**20,
        peak_gib=peak / 2**20,
        step_ms=1e3 * each,
        rows_per_step=plan.rows_per_step,
        fill=float(np.mean(tokens)) / (plan.rows_per_step * seq_len),
    )


def share(root: pathlib.Path, batch: int, seq_len: int, process: int, processes: int) -> list[list[str]]:
    """What one of `processes` reads: its rows of some steps, as text."""
    plan = opened(root, batch, seq_len)
    found = []
    for step in (0, 1, 1000, 14_999):
        rows = plan.rows(step)
        found.append([json.dumps([dataclasses.astuple(e) for e in row]) for row in rows[process::processes]])
    return found


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--records", type=int, default=100_000_000)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--seq_len", type=int, default=2048)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = pathlib.Path(scratch)
        began = time.perf_counter()
        write(root, given.records)
        print(f"index of {given.records:,} records written in {time.perf_counter() - began:.0f} s", flush=True)
        arguments = (root, given.batch, given.seq_len)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            found = pool.submit(first_row, *arguments).result()
        print(
            f"first row after {found['seconds']:.1f} s, peak memory {found['peak_gib']:.2f} GiB "
            f"({found['before_gib']:.2f} GiB before), then {found['step_ms']:.1f} ms per step of {given.batch} "
            f"examples in {found['rows_per_step']:.0f} rows of {given.seq_len} tokens, {found['fill']:.1%} full",
            flush=True,
        )
        (whole,) = ([share(*arguments, 0, 1)],)
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
            parts = [future.result() for future in [pool.submit(share, *arguments, i, 4) for i in range(4)]]
        for step, rows in enumerate(whole[0]):
            assert all(parts[i][step] == rows[i::4] for i in range(4)), "processes read different rows"
        print("rows are equal for 1 and 4 processes")


if __name__ == "__main__":
    main()
