"""Tiny stages for tests: the laptop configs, shrunk until a step takes milliseconds."""

import io
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import types
import urllib.request
from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from unimm_jax import resolve
from unimm_jax.config import Config

ROOT = pathlib.Path(__file__).parent.parent
TEXT_VOCAB = 400
STEPS = 30  # of every tiny stage
STAGES = ("encoder", "selector", "tokenizer", "pixel_decoder", "unet_decoder", "text", "stage1", "stage2", "stage3")
SIZES = ("7b", "lavit-7b", "illume-7b", "one_gpu", "laptop", "laptop-lavit", "laptop-illume", "colab")

# Settings that shrink any laptop config; used in process and on command lines.
TINY = {
    "train.steps": STEPS,
    "train.batch_size": 8,
    "train.log_every": 1,
    "train.checkpoint_every": 10,
    "model.encoder.width": 32,
    "model.encoder.depth": 1,
    "model.encoder.heads": 2,
    "model.encoder.mlp_width": 64,
    "model.image_tokenizer.heads": 2,
    "model.image_tokenizer.mlp_width": 64,
    "model.image_tokenizer.decoder_depth": 1,
    "model.image_tokenizer.codes": 32,
    "model.image_tokenizer.code_width": 8,
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
    "evals.held_out.batches": 1,
}


def has_stage(stage: str, size: str) -> bool:
    """Whether a size has a stage: ILLUME's tokenizer has no selector, LaVIT's language model has a single stage."""
    return not (stage == "selector" and "illume" in size) and not (stage in ("stage1", "stage3") and size == "lavit-7b")


def tiny_dict(stage: str, variant: str = "laptop", **changes: Any) -> ConfigDict:
    """The tiny config of a stage as a ConfigDict; `changes` by dotted name with "__" for "."."""
    config = resolve.load(f"{stage}:{variant}")
    for name, value in (TINY | {k.replace("__", "."): v for k, v in changes.items()}).items():
        node: Any = config
        *parents, last = name.split(".")
        for part in parents:
            node = node.get(part) if node is not None else None
        if node is not None and last in node:
            node[last] = value
        elif name not in TINY:
            raise KeyError(f"{stage} has no setting {name}")
    return config


def tiny(stage: str, variant: str = "laptop", **changes: Any) -> Config:
    """The parsed tiny config of a stage; `variant` is the size that is shrunk."""
    return resolve.parse(tiny_dict(stage, variant, **changes))


def arguments(stage: str, **changes: Any) -> list[str]:
    """Command-line flags that turn the laptop config of a stage into the tiny one."""
    plain, found = resolve.load(f"{stage}:laptop"), []

    def walk(a: Any, b: Any, name: str) -> None:
        for key in a:
            if hasattr(a[key], "keys"):
                walk(a[key], b[key], f"{name}.{key}")
            elif a[key] != b[key]:
                found.append(f"--config{name}.{key}={a[key]}")

    walk(tiny_dict(stage, **changes), plain, "")
    return found


def train_tiny_stages(root: pathlib.Path) -> None:
    """Trains every tiny stage, encoder to stage3, in workdirs under `root`; finished stages do nothing."""
    from unimm_jax.inference.pretokenization import pretokenize
    from unimm_jax.train import train

    for stage in ("encoder", "selector", "tokenizer"):
        train(tiny(stage), root / stage)
    pretokenize(str(root / "tokenizer"), str(root / "records"), "", "", TEXT_VOCAB, 32)
    for stage in ("pixel_decoder", "unet_decoder", "text", "stage1", "stage2", "stage3"):
        train(tiny(stage), root / stage)


def opened(config: Config) -> tuple[Any, Any]:
    """The input and the objective of a config."""
    from unimm_jax import objectives

    objective = objectives.get(config.objective)
    data = objective.open_input(config)
    return data, objective(config, data)


def link(run: pathlib.Path, root: pathlib.Path, *names: str) -> pathlib.Path:
    """A directory with links to some of the trained stages."""
    root.mkdir(exist_ok=True)
    for name in names:
        (root / name).symlink_to(run / name)
    return root


def main_command(stage: str, workdir: pathlib.Path, **changes: Any) -> list[str]:
    """The command that trains a tiny stage."""
    command = [sys.executable, "-m", "unimm_jax.main", f"--config={stage}:laptop", f"--workdir={workdir}"]
    return [*command, *arguments(stage, **changes)]


PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def peak_memory(words: list[str]) -> int:
    """Runs a command, with the compiler's own settings and nothing compiled: the bytes that it had resident at most."""
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    with tempfile.TemporaryDirectory() as folder:
        env["JAX_COMPILATION_CACHE_DIR"] = folder
        done = subprocess.run([sys.executable, "-c", PEAK, *words], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return int(done.stdout) * 1024


def command(module: str, *arguments: str, **env: str) -> subprocess.CompletedProcess:
    """Runs a command as a user would, without the tracebacks that tests ask for."""
    plain = {k: v for k, v in os.environ.items() if k != "UNIMM_TRACEBACK"} | env
    line = [sys.executable, "-m", f"unimm_jax.{module}", *map(str, arguments)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env=plain)


def start_processes(commands: Sequence[list[str]], **env: str) -> list[subprocess.Popen]:
    """Starts commands as the processes of one run, each with one fake device, as a user would start them."""
    env = {name: value for name, value in os.environ.items() if name != "UNIMM_TRACEBACK"} | {
        "XLA_FLAGS": xla_flags(1),
        "JAX_PLATFORMS": "cpu",
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
        "JAX_NUM_PROCESSES": str(len(commands)),
    } | env  # fmt: skip
    pipes: dict[str, Any] = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    return [
        subprocess.Popen(words, env=env | {"JAX_PROCESS_ID": str(index)}, **pipes)
        for index, words in enumerate(commands)
    ]


def put(source: pathlib.Path, target: str) -> None:
    """Copies a directory, links followed, to an object store."""
    from unimm_jax import storage

    storage.upload_tree(pathlib.Path(source).resolve(), storage.path(target))


def faults(**wanted: Any) -> dict[str, int]:
    """What the server of `object_store.py` does wrong from now on; the numbers of requests, and of failed ones."""
    url = f"{os.environ['STORAGE_EMULATOR_HOST']}/faults"
    with urllib.request.urlopen(url, json.dumps(wanted).encode()) as reply:
        return json.load(reply)


def xla_flags(devices: int) -> str:
    """XLA_FLAGS for a process with so many fake CPU devices that compiles fast."""
    return f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"  # conftest.py sets the rest


def free_port() -> int:
    """A port of the loopback interface that nobody uses."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def write_random_records(path: pathlib.Path, count: int = 96) -> None:
    """Records of scenes with random keep masks and codes: nothing in them depends on a trained model."""
    from benchmarks.faults.records import write_records

    write_records(path, count, words=TEXT_VOCAB)


def with_records(stage: str, run: pathlib.Path, **changes: Any) -> Config:
    """The parsed tiny config of a stage; stages that read records read those of `run`."""
    reads = "records" in tiny_dict(stage).data
    return tiny(stage, **changes | (dict(data__records=str(run / "records")) if reads else {}))


# ---- Self-enhancement ------------------------------------------------------------------------------------------------


def paint(prompt: str, good: bool = True, background: int = 1) -> np.ndarray:
    """An image uint8 [64, 64, 3] of what a prompt of the scenes says; without its last object if not `good`."""
    from unimm_jax.data import scene_language, scenes

    looks, relation = scene_language.parse(prompt)
    places = [(0.2, 0.2), (0.8, 0.8), (0.2, 0.8), (0.8, 0.2)]
    if relation:
        places = {
            "left": [(0.2, 0.5), (0.8, 0.5)],
            "right": [(0.8, 0.5), (0.2, 0.5)],
            "above": [(0.5, 0.2), (0.5, 0.8)],
            "below": [(0.5, 0.8), (0.5, 0.2)],
        }[relation]
    objects = [
        scenes.SceneObject(s, c or "red", 0.1, *place)
        for (s, c), place in zip(looks, places[: len(looks)], strict=True)
    ]
    return scenes.render(scenes.Scene("mixed", tuple(objects if good else objects[:-1]), background))


class FakeRecords:
    """Records of scenes that were never pretokenized: keys, texts and images."""

    def __init__(self, count: int):
        from unimm_jax.data.outlines import flatten, outline
        from unimm_jax.data.records import StoredRecord
        from unimm_jax.data.sources import open_source
        from unimm_jax.data.transforms import encode_png

        self.header, self._outline, source = {"contents": f"scenes {count}"}, outline, open_source("scenes")
        records = [source[i] for i in range(count)]
        self.texts = [[len(text) for text in flatten(record)[0]] for record in records]  # tokens
        self.codes = [flatten(record)[1] for record in records]
        self.text_tokenizer = types.SimpleNamespace(encode=str.split)
        self.items = [StoredRecord(r.key, [encode_png(r.images[0])], [], [], flatten(r)[0], []) for r in records]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]

    def outline(self, index: int) -> Any:
        return self._outline(self.codes[index], 1)


class FakePainter:
    """Draws prompts: right if the sum of seed and index is odd. Notes in `asked` what it was asked for."""

    def __init__(self):
        self.asked: list[tuple[list[str], int]] = []

    def generate_image_tokens(self, prompts, sampling, seed):
        self.asked.append((list(prompts), seed))
        return np.arange(len(prompts)) + seed

    def codes(self, ids):
        return ids, ids

    def decode(self, codes, keep, decoder, seed):
        return np.stack([paint(prompt, n % 2, n) for prompt, n in zip(self.asked[-1][0], codes.tolist(), strict=True)])


def write_drawings(folder: pathlib.Path, records: int = 12, **settings: Any) -> tuple[Any, Any]:
    """Drawings for every one of some records: (drawings, records)."""
    from unimm_jax.enhancement.drawings import Drawings, DrawingSettings, draw_blocks, select

    stored, wanted = FakeRecords(records), DrawingSettings(share=1.0, **settings)
    chosen, _ = select(stored, 1.0, wanted.seed)
    identity = dict(records=stored.header["contents"], settings=dict(samples=wanted.samples, seed=wanted.seed))
    draw_blocks(FakePainter(), stored, chosen, folder, wanted, identity)
    return Drawings(folder), stored


def write_tfds(root, items):
    """Writes a TFDS data set "made" of (encoded image, caption) under a directory; its builder."""
    import tensorflow_datasets as tfds

    items = list(items)

    class Made(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # several tests of a process write one
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {"image": tfds.features.Image(), "caption": tfds.features.Text()}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i, (image, caption) in enumerate(items):
                yield i, {"image": io.BytesIO(image), "caption": caption}

    builder = Made(data_dir=str(root), file_format="array_record")
    builder.download_and_prepare()
    return builder
