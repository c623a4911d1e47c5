"""The train step of `benchmarks.lm_step` with 8 rows against MaxText and against PyTorch in eager mode.

python -m venv maxtext && maxtext/bin/pip install "maxtext[tpu]==0.2.5"    # Python 3.12, 3 GB, with its own jax
python -m benchmarks.lm_step_maxtext maxtext/bin/python

MaxText's trainer runs in its own process on synthetic data, in float32 with its default rematerialization (full). After
each step it is stopped until its next turn.
"""

import dataclasses
import pathlib
import signal
import subprocess
import sys
import tempfile

import numpy as np

from benchmarks import lm_step, timing

CASE = dataclasses.replace(lm_step.CPU, rows=8)
LAUNCH = (
    "import pathlib, runpy, sys, maxtext; base = pathlib.Path(maxtext.__file__).parent / 'configs/base.yml'; "
    "sys.argv.insert(1, str(base)); runpy.run_module('maxtext.trainers.pre_train.train', run_name='__main__')"
)


def settings(folder: str) -> list[str]:
    """MaxText's settings for `CASE`."""
    shape = CASE.shape
    values = {
        "run_name": "step",
        "base_output_directory": folder,
        "hardware": "cpu",
        "skip_jax_distributed_system": True,
        "dataset_type": "synthetic",
        "steps": 10_000,
        "decoder_block": "llama2",
        "base_emb_dim": shape.width,
        "base_num_query_heads": shape.heads,
        "base_num_kv_heads": shape.kv_heads,
        "head_dim": shape.head_width,
        "base_mlp_dim": shape.mlp_width,
        "base_num_decoder_layers": shape.layers,
        "vocab_size": CASE.text_rows + 128,
        "max_target_length": CASE.length,
        "per_device_batch_size": CASE.rows,
        "dtype": "float32",
        "weight_dtype": "float32",
        "mlp_activations": '["silu","linear"]',
        "attention": "dot_product",
        "remat_policy": "full",
        "enable_checkpointing": False,
        "enable_goodput_recording": False,
        "monitor_goodput": False,
    }
    return [f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in values.items()]


class MaxText:
    """MaxText's trainer, stopped between calls of `step`."""

    def __init__(self, python: str, folder: str):
        self.log: list[str] = []
        command = [python, "-u", "-c", LAUNCH, *settings(folder)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(4):  # compilation, and steps that were dispatched ahead
            self.step()

    def step(self) -> None:
        """Runs one step."""
        self.process.send_signal(signal.SIGCONT)
        for line in self.process.stdout or ():
            self.log.append(line)
            if "completed step" in line:
                return self.process.send_signal(signal.SIGSTOP)
        raise SystemExit("MaxText ended:\n" + "".join(self.log[-20:]))


if __name__ == "__main__":
    if len(sys.argv) != 2 or not pathlib.Path(sys.argv[1]).exists():
        raise SystemExit(
            "usage: python -m benchmarks.lm_step_maxtext PYTHON (the Python of an environment with MaxText)"
        )
    timing.prepare()
    ids = np.random.default_rng(0).integers(0, CASE.text_rows, (CASE.rows, CASE.length))
    with tempfile.TemporaryDirectory() as folder:
        maxtext = MaxText(sys.argv[1], folder)
        try:
            peers = {"MaxText 0.2.5": maxtext.step, "transformers, eager": lm_step.theirs(CASE, ids, False)}
            timing.compare("LM train step, 20M, 8 rows, float32", lm_step.ours(CASE, ids), peers)
        finally:
            maxtext.process.kill()
