"""Tiny stages that the tests share: the laptop configs, shrunk until a step takes milliseconds."""

import fcntl
import importlib
import os
import pathlib
import sys

import pytest

from unimm_jax import main as process

# Tests compile much and run little.
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_opt_preset=CPU_OPT_PRESET_FAST_COMPILE")
process.prepare_process(keep_memory=False)
os.environ.setdefault("UNIMM_TRACEBACK", "1")
ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

# Flags that shrink any laptop config; used in process and on command lines alike.
TINY = {
    "train.steps": 6,
    "train.batch_size": 8,
    "train.log_every": 1,
    "train.checkpoint_every": 2,
    "model.encoder.width": 32,
    "model.encoder.depth": 1,
    "model.encoder.heads": 2,
    "model.encoder.mlp_width": 64,
    "model.tokenizer.heads": 2,
    "model.tokenizer.mlp_width": 64,
    "model.tokenizer.decoder_depth": 1,
    "model.tokenizer.codes": 32,
    "model.tokenizer.code_width": 8,
    "model.text_tower.width": 32,
    "model.text_tower.joint_width": 16,
    "model.language.width": 32,
    "model.language.layers": 2,
    "model.language.heads": 2,
    "model.language.kv_heads": 1,
    "model.language.head_width": 16,
    "model.language.mlp_width": 64,
    "model.pixel_decoder.width": 32,
    "model.pixel_decoder.heads": 2,
    "model.pixel_decoder.mlp_width": 64,
    "model.unet.block_out_channels": (16, 32),
    "model.unet.cross_attention_dim": 32,
    "loss.kmeans_samples": 1,
    "loss.sampling_steps": 3,
    "data.sources": "scenes:count=96",
}


def tiny(stage, **changes):
    """The tiny config of a stage; `changes` by dotted name with "__" for "."."""
    config = importlib.import_module(f"configs.{stage}").get_config("laptop")
    wanted = dict(TINY) | {k.replace("__", "."): v for k, v in changes.items()}
    for name, value in wanted.items():
        node = config
        *parents, last = name.split(".")
        for part in parents:
            node = node.get(part) if node is not None else None
        if node is not None and last in node:
            node[last] = value
    return config


def arguments(config, stage):
    """Command-line flags that turn the laptop config of a stage into `config`."""
    plain = importlib.import_module(f"configs.{stage}").get_config("laptop")
    found = []

    def walk(a, b, name):
        for key in a:
            if hasattr(a[key], "keys"):
                walk(a[key], b[key], f"{name}.{key}")
            elif a[key] != b[key]:
                found.append(f"--config{name}.{key}={a[key]}")

    walk(config, plain, "")
    return found


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A directory with every tiny stage trained: encoder … stage3. Workers of pytest-xdist share it."""
    from unimm_jax.pretokenize import pretokenize
    from unimm_jax.train import train

    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "run"
    with open(f"{root}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # stages that another worker has finished do nothing here; no test may change what others read
        for stage in ("encoder", "selector", "tokenizer"):
            train(tiny(stage), root / stage)
        pretokenize(str(root / "tokenizer"), str(root / "records"), "", "", 400, 32)
        for stage in ("pixel_decoder", "detokenizer", "text", "stage1", "stage2", "stage3"):
            train(tiny(stage), root / stage)
    return root
