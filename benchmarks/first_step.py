"""Time to the first step of a stage of size laptop, with a cold and with a warm compilation cache.

python -m benchmarks.first_step RUN

RUN is the directory of a finished quickstart. Its stage 2 is started twice in a new workdir.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

if __name__ == "__main__":
    run = pathlib.Path(sys.argv[1]).absolute()
    with tempfile.TemporaryDirectory() as scratch:
        seconds = {}
        for name in ("cold", "warm"):
            home = pathlib.Path(scratch) / name
            home.mkdir()
            for part in ("records", "stage1", "tokenizer"):
                (home / part).symlink_to(run / part)
            command = [
                sys.executable, "-m", "unimm_jax.main", "--config=configs/stage2.py:laptop",
                f"--workdir={home / 'stage2'}", "--config.train.steps=1", "--config.train.log_every=1",
                "--config.evals.held_out.batches=1",
            ]  # fmt: skip
            env = os.environ | {
                "JAX_COMPILATION_CACHE_DIR": f"{scratch}/cache",
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
            }
            began = time.perf_counter()
            subprocess.run(command, check=True, env=env, stdout=subprocess.DEVNULL)
            row = json.loads((home / "stage2" / "metrics.jsonl").read_text().splitlines()[-1])
            seconds[name] = row["compile_seconds"], time.perf_counter() - began
    for name, (first, whole) in seconds.items():
        print(f"{name}: first step {first:.1f} s, whole command {whole:.1f} s")
    ratios = [warm / cold for warm, cold in zip(seconds["warm"], seconds["cold"], strict=True)]
    print(f"warm / cold: first step {ratios[0]:.2f}, whole command {ratios[1]:.2f}")
