"""Every path on an object store: a server on loopback, compared with the same commands on a local disk."""

import os
import pathlib
import signal
import subprocess
import time

import jax
import numpy as np
import pytest
from helpers import ROOT, command, faults, free_port, link, main_command, put, xla_flags

from unimm_jax import metrics, storage
from unimm_jax.checkpoint import find, read_params
from unimm_jax.data.records import Records


@pytest.fixture
def no_local_copies():
    """No directory of the scheme's name appears where commands run."""
    yield
    assert not [name for name in (ROOT / "gs:", pathlib.Path("gs:")) if name.exists()]


def same_params(a, b):
    one, other = (jax.tree.leaves(read_params(find(place))) for place in (a, b))
    return len(one) > 0 and all(np.array_equal(x, y) for x, y in zip(one, other, strict=True))


def test_paths_have_one_spelling(bucket):
    assert str(storage.path("gs://bucket/a/../b//c/")) == "gs://bucket/b/c"
    assert str(storage.at("gs://bucket/run/stage2", "../records")) == "gs://bucket/run/records"
    assert str(storage.at("gs://bucket/run", "gs://other/x")) == "gs://other/x"
    assert storage.at("gs://bucket/run", "/data/x") == pathlib.Path("/data/x")
    assert str(storage.path(pathlib.Path("gs://bucket/x"))) == "gs://bucket/x"  # pathlib drops a slash


def test_copies_are_kept_within_the_bound_and_fetched_again_when_the_file_changes(bucket, monkeypatch, tmp_path):
    monkeypatch.setenv("UNIMM_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("UNIMM_CACHE_GIB", str(250_000 / 2**30))
    files = [storage.path(f"{bucket}/bound/{i}") for i in range(4)]
    for i, file in enumerate(files):
        file.write_bytes(bytes([i]) * 100_000)
    for _ in range(2):
        for i, file in enumerate(files):
            assert storage.local_file(file).read_bytes() == bytes([i]) * 100_000
            time.sleep(0.01)
    kept = list(tmp_path.glob("*/*"))
    assert sum(file.stat().st_size for file in kept) <= 250_000 and {file.name for file in kept} == {"2", "3"}
    first = storage.local_file(files[3])
    assert storage.local_file(files[3]) == first
    files[3].write_bytes(b"other")
    assert storage.local_file(files[3]).read_bytes() == b"other"


def test_checksums_come_from_the_store_and_compare_with_local_copies(bucket, tmp_path):
    folder = storage.path(f"{bucket}/sums")
    (folder / "a").write_bytes(b"one")
    (folder / "b" / "c").write_bytes(b"two")
    found = storage.checksums(folder)
    assert sorted(found) == ["a", "b/c"] and all(value.startswith("md5:") for value in found.values())
    (tmp_path / "b").mkdir()
    (tmp_path / "a").write_bytes(b"one")
    (tmp_path / "b" / "c").write_bytes(b"two")
    assert storage.checksums(tmp_path, found) == found
    local = storage.checksums(tmp_path)
    assert not any(value.startswith("md5:") for value in local.values())
    assert storage.checksums(folder, local) == local


def test_training_stopped_and_resumed_on_the_store_equals_the_local_run(run, bucket, tmp_path, no_local_copies):
    changes = dict(train__steps=24, train__checkpoint_every=5, train__log_every=1)
    local = link(run, tmp_path, "records", "stage2", "tokenizer", "pixel_decoder")
    subprocess.run(main_command("stage3", local / "stage3", **changes), cwd=ROOT, check=True, capture_output=True)
    for name in ("records", "stage2", "tokenizer", "pixel_decoder"):
        put(run / name, f"{bucket}/run/{name}")
    words = main_command("stage3", f"{bucket}/run/stage3", **changes)
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        said = ""
        for line in process.stdout:
            said += line
            if " 8/24" in line:
                process.send_signal(signal.SIGTERM)
    assert process.returncode == 143, said[-3000:]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "resumes from step" in done.stdout, done.stderr[-3000:]
    assert "checkpoint not used" not in said + done.stderr  # every checkpoint verifies, also those that it starts from
    remote = storage.path(f"{bucket}/run/stage3")
    for name in ("metrics.jsonl", "evals.jsonl"):
        rows = [[row["loss"] for row in metrics.read(place, name)] for place in (local / "stage3", remote)]
        assert rows[0] == rows[1] and len(rows[0]) == (24 if name == "metrics.jsonl" else 1), said + done.stderr
    assert same_params(local / "stage3", remote)
    assert any((remote / "tensorboard").iterdir()) and (remote / "done.json").exists()

    scores = {}
    for place in (local, f"{bucket}/run"):
        done = command("evaluate", f"--checkpoint={place}/stage3", f"--output={place}/evaluation", "--evals=loss")
        assert done.returncode == 0, done.stderr[-3000:]
        scores[place] = storage.path(f"{place}/evaluation/scores.json").read_text().partition('"evaluation_seconds"')[0]
    assert len(set(scores.values())) == 1
    files = {}
    for place in (local, f"{bucket}/run"):
        done = command("export", f"--checkpoint={place}/stage3", f"--output={place}/hf")
        assert done.returncode == 0, done.stderr[-3000:]
        folder = storage.path(f"{place}/hf")
        files[place] = {name: (folder / name).read_bytes() for name in storage.files_under(folder)}
    assert files[local].keys() == files[f"{bucket}/run"].keys()
    assert files[local]["model.safetensors"] == files[f"{bucket}/run"]["model.safetensors"]
    done = command("export", f"--checkpoint={bucket}/run/stage3", f"--output={bucket}/run/hf")
    assert done.returncode == 1 and "exists; give another --output" in done.stderr


@pytest.mark.slow
def test_two_processes_on_the_store_equal_two_on_the_local_disk(run, bucket, tmp_path, no_local_copies):
    """The tokenizer stage; one process gets SIGTERM, both stop and resume."""
    changes = dict(train__steps=12, train__checkpoint_every=4, train__log_every=1)

    def under_way(workdir):
        address = f"127.0.0.1:{free_port()}"
        env = os.environ | {"XLA_FLAGS": xla_flags(1), "JAX_PLATFORMS": "cpu", "JAX_NUM_PROCESSES": "2"}
        env["JAX_COORDINATOR_ADDRESS"] = address
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        words = main_command("tokenizer", workdir, **changes)
        return [subprocess.Popen(words, cwd=ROOT, env=env | {"JAX_PROCESS_ID": str(i)}, **pipes) for i in range(2)]

    def ended(processes, status):
        said = [process.communicate(timeout=240)[0] for process in processes]
        assert [process.returncode for process in processes] == [status] * 2, "\n".join(said)[-4000:]

    local = link(run, tmp_path, "selector")
    put(run / "selector", f"{bucket}/two/selector")
    ended(under_way(local / "tokenizer"), 0)
    processes = under_way(f"{bucket}/two/tokenizer")
    next(line for line in processes[0].stdout if " 6/12" in line)
    processes[1].send_signal(signal.SIGTERM)
    ended(processes, 143)
    ended(under_way(f"{bucket}/two/tokenizer"), 0)
    remote = storage.path(f"{bucket}/two/tokenizer")
    rows = [[row["loss"] for row in metrics.read(place)] for place in (local / "tokenizer", remote)]
    assert rows[0] == rows[1] and len(rows[0]) == 12
    assert same_params(local / "tokenizer", remote)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_store_that_fails_now_and_then_loses_nothing(run, bucket, tmp_path, seed):
    """5% of the requests are answered with 429, 503 or a part of the body."""
    changes = dict(train__steps=16, train__checkpoint_every=4, train__log_every=1)
    local = link(run, tmp_path, "records", "stage2", "tokenizer", "pixel_decoder")
    subprocess.run(main_command("stage3", local / "stage3", **changes), cwd=ROOT, check=True, capture_output=True)
    for name in ("records", "stage2", "tokenizer", "pixel_decoder"):
        put(run / name, f"{bucket}/faults{seed}/{name}")
    before = faults(share=0.05, seed=seed)["failed"]
    try:
        words = main_command("stage3", f"{bucket}/faults{seed}/stage3", **changes)
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    finally:
        failed = faults()["failed"] - before
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert failed > 5
    remote = storage.path(f"{bucket}/faults{seed}/stage3")
    rows = [[row["loss"] for row in metrics.read(place)] for place in (local / "stage3", remote)]
    assert rows[0] == rows[1] and len(rows[0]) == 16, done.stderr[-4000:]
    assert same_params(local / "stage3", remote) and find(remote).name == "16"


def test_records_on_the_store_are_those_of_the_local_disk(run, bucket, no_local_copies):
    put(run / "tokenizer", f"{bucket}/records/tokenizer")
    put(run / "selector", f"{bucket}/records/selector")
    flags = [f"--image_tokenizer={bucket}/records/tokenizer", f"--output={bucket}/records/records"]
    done = command("pretokenize", *flags, f"--text_tokenizer={run / 'stage3'}", "--batch_size=32")
    assert done.returncode == 0, done.stderr[-3000:]
    one, other = Records(run / "records"), Records(f"{bucket}/records/records")
    assert len(one) == len(other) and one.header["contents"] == other.header["contents"]
    for i in range(len(one)):
        a, b = one[i], other[i]
        assert a.images == b.images and a.texts == b.texts and np.array_equal(a.codes, b.codes)
    again = command("pretokenize", *flags, f"--text_tokenizer={run / 'stage3'}", "--batch_size=32")
    assert again.returncode == 0 and "are already in" in again.stdout


def test_a_changed_file_of_a_checkpoint_on_the_store_is_found(run, bucket, capsys):
    put(run / "text", f"{bucket}/changed/text")
    step = find(f"{bucket}/changed/text")
    name = next(name for name in storage.files_under(step) if "/d/" in name)
    (step / name).write_bytes((step / name).read_bytes()[:-1] + b"x")
    done = command("evaluate", f"--checkpoint={bucket}/changed/text", f"--output={bucket}/changed/evaluation")
    assert done.returncode == 1 and "has changed" in done.stderr + done.stdout
