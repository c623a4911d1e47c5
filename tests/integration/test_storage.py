"""Every path on an object store: a server on loopback, compared with the same commands on a local disk."""

import concurrent.futures
import contextlib
import errno
import gc
import os
import pathlib
import re
import signal
import subprocess
import time

import jax
import numpy as np
import pytest
import requests
from array_record.python import array_record_module
from helpers import (
    ROOT,
    TEXT_VOCAB,
    faults,
    free_port,
    link,
    main_command,
    put,
    tiny,
    with_records,
    write_drawings,
    write_random_records,
    xla_flags,
)  # fmt: skip
from peers import language

from benchmarks.faults import judge
from unimm_jax import environment, metrics, runcard, storage
from unimm_jax.checkpoint import Checkpoints, find, read_params, verify
from unimm_jax.data.records import Records
from unimm_jax.data.remote_blocks import RemoteBlocks
from unimm_jax.enhancement import building, drawings
from unimm_jax.enhancement.assessing import assess
from unimm_jax.enhancement.journal import Journal, read_verdicts
from unimm_jax.enhancement.verdicts import Verdict
from unimm_jax.errors import CheckpointError, CorruptCheckpointError, DataError, StorageError, WeightsFileError
from unimm_jax.evals.runner import evaluate
from unimm_jax.inference.pretokenization import pretokenize
from unimm_jax.interop.exporter import export
from unimm_jax.interop.importer import import_weights
from unimm_jax.train import train


@pytest.fixture
def no_local_copies():
    """No directory of the scheme's name appears where commands run."""
    yield
    assert not [name for name in (ROOT / "gs:", pathlib.Path("gs:")) if name.exists()]


def assert_same(local, remote, steps):
    """Finished runs have the same parameters, optimizer state, position in the data, metrics and scores."""
    wanted, found = judge.left(local), judge.left(remote)
    assert judge.differences(wanted, found) == []
    assert len(wanted["metrics"]) == steps and any("opt" in name for name in wanted["state"])


def evaluated_and_exported(place):
    """Scores of a stage 3 and the files of its export."""
    evaluate(f"{place}/stage3", f"{place}/evaluation", ["loss"])
    scores = storage.path(f"{place}/evaluation/scores.json").read_text().partition('"evaluation_seconds"')[0]
    export(f"{place}/stage3", f"{place}/hf", verify=False)
    folder = storage.path(f"{place}/hf")
    return scores, {name: (folder / name).read_bytes() for name in storage.files_under(folder)}


def assert_used_alike(local, remote):
    """Evaluation and export of a stage 3 give the same scores and weights."""
    (scores, files), (other_scores, other_files) = (evaluated_and_exported(place) for place in (local, remote))
    assert scores == other_scores and files.keys() == other_files.keys()
    assert files["model.safetensors"] == other_files["model.safetensors"]


@pytest.mark.slow
def test_compiled_programs_are_read_from_the_store(bucket, tmp_path, no_local_copies):
    """A second machine, without a cache of its own, compiles little again: a program or two are not kept."""
    env = os.environ | dict(JAX_COMPILATION_CACHE_DIR=f"{bucket}/xla", JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
    env["JAX_DEBUG_LOG_MODULES"] = "jax._src.compiler"
    said = []
    for name in ("first", "second"):
        words = main_command("encoder", tmp_path / name)
        said.append(subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True, env=env).stderr)
    misses, hits = (
        [re.findall(words + " for '([^']+)'", text) for text in said]
        for words in ("PERSISTENT COMPILATION CACHE MISS", "Persistent compilation cache hit")
    )
    assert len(misses[1]) < len(misses[0]) / 4 and len(hits[1]) > len(misses[0]) / 2, (misses, hits)


def test_paths_have_one_spelling(bucket):
    assert str(storage.path("gs://bucket/a/../b//c/")) == "gs://bucket/b/c"
    assert str(storage.at("gs://bucket/run/stage2", "../records")) == "gs://bucket/run/records"
    assert str(storage.at("gs://bucket/run", "gs://other/x")) == "gs://other/x"
    assert storage.at("gs://bucket/run", "/data/x") == pathlib.Path("/data/x")
    assert str(storage.path(pathlib.Path("gs://bucket/x"))) == "gs://bucket/x"  # pathlib drops a slash


@pytest.mark.parametrize("store", ["bucket", "s3_bucket"])
def test_any_part_of_a_file_is_read(store, request, tmp_path):
    for folder in (tmp_path, storage.path(f"{request.getfixturevalue(store)}/parts")):
        storage.write_whole(folder / "empty", b"")
        storage.write_whole(folder / "file", b"abcdef")
        parts = [(0, None), (2, None), (1, 3), (4, 9), (6, 2), (9, 2), (3, 0)]
        found = [storage.read(folder / "file", start, size) for start, size in parts]
        assert found == [b"abcdef", b"cdef", b"bcd", b"ef", b"", b"", b""]
        assert [storage.read(folder / "empty", *part) for part in ((0, None), (0, 5))] == [b"", b""]
        with pytest.raises(FileNotFoundError, match="No such file or directory"):
            storage.read(folder / "none")
        assert [storage.kind(folder / name) for name in ("file", "none", "")] == ["file", "", "directory"]
        assert storage.children(folder) == {"empty": False, "file": False} and not storage.children(folder / "none")


@pytest.mark.parametrize("store", ["bucket", "s3_bucket"])
def test_a_file_keeps_its_first_and_last_bytes(store, request, tmp_path):
    """The server of the tests once took a last byte 13 for a part of the request's frame."""
    folder = storage.path(f"{request.getfixturevalue(store)}/ends")
    for i, content in enumerate([b"a\r", b"a\n", b"a\r\n", b"\r\n\r\na", b"\n\na", b"\n", b"\r", bytes(range(256))]):
        (tmp_path / str(i)).write_bytes(content)
        storage.write_whole(folder / f"written{i}", content)
        storage.upload(tmp_path / str(i), folder / f"copied{i}")
        assert [storage.read(folder / f"{name}{i}") for name in ("written", "copied")] == [content] * 2


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


def test_a_full_local_disk_is_not_an_error_of_the_store(bucket, monkeypatch):
    file = storage.path(f"{bucket}/full/file")
    storage.write_whole(file, b"data")

    def fill(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage._filesystem(file), "get_file", fill)
    with pytest.raises(OSError, match="No space left on device"):
        storage.local_file(file)


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


CHANGES = dict(train__steps=24, train__checkpoint_every=5, train__log_every=1)


@pytest.fixture(scope="module")
def trained(run, bucket, tmp_path_factory):
    """Stage 3 on a local disk and on the store: stopped by SIGTERM there, and resumed. (local, remote, output)."""
    local = link(run, tmp_path_factory.mktemp("trained"), "records", "stage2", "tokenizer", "pixel_decoder")
    train(tiny("stage3", **CHANGES), local / "stage3")
    for name in ("records", "stage2", "tokenizer", "pixel_decoder"):
        put(run / name, f"{bucket}/run/{name}")
    words = main_command("stage3", f"{bucket}/run/stage3", **CHANGES)
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        said = ""
        for line in process.stdout:
            said += line
            if " 8/24" in line:
                process.send_signal(signal.SIGTERM)
    assert process.returncode == 143, said[-3000:]
    train(tiny("stage3", **CHANGES), f"{bucket}/run/stage3")
    return local, f"{bucket}/run", said


def test_training_stopped_and_resumed_on_the_store_equals_the_local_run(trained, no_local_copies):
    local, remote, said = trained
    assert "checkpoint not used" not in said  # every checkpoint verifies, also those that it starts from
    places = (local / "stage3", storage.path(f"{remote}/stage3"))
    for name in ("metrics.jsonl", "evals.jsonl"):
        rows = [[row["loss"] for row in metrics.read(place, name)] for place in places]
        assert rows[0] == rows[1] and len(rows[0]) == (24 if name == "metrics.jsonl" else 1), said
    assert_same(*places, 24)
    cards = [runcard.read(place) for place in places]
    assert cards[0]["steps"] == cards[1]["steps"]
    assert [session["start"] > 0 for session in cards[1]["sessions"]] == [False, True]
    assert any((places[1] / "tensorboard").iterdir()) and (places[1] / "done.json").exists()


def test_evaluation_and_export_on_the_store_equal_the_local_ones(trained, no_local_copies):
    assert_used_alike(*trained[:2])
    with pytest.raises(DataError, match="exists; give another --output"):
        export(f"{trained[1]}/stage3", f"{trained[1]}/hf")


@pytest.mark.slow
def test_two_processes_on_the_store_equal_two_on_the_local_disk(run, bucket, tmp_path, no_local_copies):
    """Stage 3; one process gets SIGTERM, both stop and resume. The results are evaluated and exported."""
    changes = dict(train__steps=12, train__checkpoint_every=4, train__log_every=1)
    before = ("records", "stage2", "tokenizer", "pixel_decoder")

    def under_way(workdir):
        address = f"127.0.0.1:{free_port()}"
        env = os.environ | {"XLA_FLAGS": xla_flags(1), "JAX_PLATFORMS": "cpu", "JAX_NUM_PROCESSES": "2"}
        env["JAX_COORDINATOR_ADDRESS"] = address
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        words = main_command("stage3", workdir, **changes)
        return [subprocess.Popen(words, cwd=ROOT, env=env | {"JAX_PROCESS_ID": str(i)}, **pipes) for i in range(2)]

    def ended(processes, status):
        said = [process.communicate(timeout=240)[0] for process in processes]
        assert [process.returncode for process in processes] == [status] * 2, "\n".join(said)[-4000:]

    local = link(run, tmp_path, *before)
    for name in before:
        put(run / name, f"{bucket}/two/{name}")
    ended(under_way(local / "stage3"), 0)
    processes = under_way(f"{bucket}/two/stage3")
    next(line for line in processes[0].stdout if " 6/12" in line)
    processes[1].send_signal(signal.SIGTERM)
    ended(processes, 143)
    ended(under_way(f"{bucket}/two/stage3"), 0)
    assert_same(local / "stage3", storage.path(f"{bucket}/two/stage3"), 12)
    assert_used_alike(local, f"{bucket}/two")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_store_that_fails_now_and_then_loses_nothing(run, bucket, tmp_path, seed):
    """5% of the requests get 429 or 503, half of the body, or no confirmation of a change.

    pytest -s -m slow tests/integration/test_storage.py -k now_and_then: prints how many.
    """
    changes = dict(train__steps=16, train__checkpoint_every=4, train__log_every=1)
    local = link(run, tmp_path, "records", "stage2", "tokenizer", "pixel_decoder")
    subprocess.run(main_command("stage3", local / "stage3", **changes), cwd=ROOT, check=True, capture_output=True)
    for name in ("records", "stage2", "tokenizer", "pixel_decoder"):
        put(run / name, f"{bucket}/faults{seed}/{name}")
    before = faults(share=0.05, seed=seed)
    try:
        words = main_command("stage3", f"{bucket}/faults{seed}/stage3", **changes)
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        counts = faults(share=0.05, seed=seed)
        failed, requests = (counts[name] - before[name] for name in ("failed", "requests"))
        print(f"seed {seed}: {failed} of {requests} requests failed")
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        assert failed > 5
        assert_used_alike(local, f"{bucket}/faults{seed}")
    finally:
        faults()
    assert_same(local / "stage3", storage.path(f"{bucket}/faults{seed}/stage3"), 16)


def test_records_on_the_store_are_those_of_the_local_disk(run, bucket, capsys, no_local_copies):
    put(run / "tokenizer", f"{bucket}/records/tokenizer")
    put(run / "selector", f"{bucket}/records/selector")
    arguments = (f"{bucket}/records/tokenizer", f"{bucket}/records/records", "", str(run / "stage3"), TEXT_VOCAB, 32)
    pretokenize(*arguments)
    one, other = Records(run / "records"), Records(f"{bucket}/records/records")
    assert len(one) == len(other) and one.header["contents"] == other.header["contents"]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for a, b in zip(
            map(one.__getitem__, range(len(one))), pool.map(other.__getitem__, range(len(one))), strict=True
        ):
            assert a.images == b.images and a.texts == b.texts and np.array_equal(a.codes, b.codes)
    pretokenize(*arguments)
    assert "are already in" in capsys.readouterr().out


def test_a_cache_that_is_too_small_is_not_taken_for_damaged_records(run, bucket, monkeypatch, tmp_path):
    put(run / "records", f"{bucket}/small_cache/records")
    monkeypatch.setenv("UNIMM_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("UNIMM_CACHE_GIB", "1e-9")  # every copy removes all others
    local, remote = Records(run / "records"), Records(f"{bucket}/small_cache/records")
    assert remote[0].texts == local[0].texts and remote[len(local) - 1].texts == local[len(local) - 1].texts
    monkeypatch.setattr(storage, "local_file", lambda file: tmp_path / "removed")
    with pytest.raises(StorageError, match="is removed as soon as it is there: raise UNIMM_CACHE_GIB"):
        Records(f"{bucket}/small_cache/records")
    with pytest.raises(StorageError, match="raise UNIMM_CACHE_GIB"):
        remote._reader._open(0)


def test_blocks_that_were_removed_from_the_cache_take_no_space(bucket, monkeypatch, tmp_path):
    """Their readers stayed open, and an open file keeps its space."""
    monkeypatch.setenv("UNIMM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("UNIMM_CACHE_GIB", "1e-9")
    for i in range(4):
        writer = array_record_module.ArrayRecordWriter(str(tmp_path / f"{i}.array_record"), "group_size:1")
        writer.write(bytes([i]))
        writer.close()
        storage.upload(tmp_path / f"{i}.array_record", storage.path(f"{bucket}/open/{i}.array_record"))

    def removed():
        links = []
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):
                links.append(os.readlink(f"/proc/self/fd/{name}"))
        return [link for link in links if link.endswith("(deleted)") and link.startswith(str(tmp_path))]

    blocks = RemoteBlocks([storage.path(f"{bucket}/open/{i}.array_record") for i in range(4)], [1] * 4)
    for i in (0, 1, 2, 3, 0, 3):
        assert blocks[i] == bytes([i])
        gc.collect()
        assert not removed()


def test_preflight_warns_of_records_that_the_cache_cannot_hold(run, bucket, monkeypatch):
    put(run / "records", f"{bucket}/large/records")
    config = tiny("stage3", data__records=f"{bucket}/large/records")
    assert not list(environment._records_on_store(config))
    monkeypatch.setenv("UNIMM_CACHE_GIB", "1e-5")
    (found,) = environment._records_on_store(config)
    assert found.level == "warning" and "0.0 GiB" in found.text and "mount the bucket" in found.remedy


def test_a_changed_file_of_a_checkpoint_on_the_store_is_found(run, bucket, caplog):
    put(run / "text", f"{bucket}/changed/text")
    step = find(f"{bucket}/changed/text")
    name = next(name for name in storage.files_under(step) if "/d/" in name)
    (step / name).write_bytes((step / name).read_bytes()[:-1] + b"x")
    with pytest.raises(CorruptCheckpointError, match="has changed"):
        verify(step)
    (step / "digests.json").write_bytes((step / "digests.json").read_bytes() + b" ")
    assert find(f"{bucket}/changed/text").name == "20" and "checkpoint not used" in caplog.text


def test_objects_that_stand_for_directories_are_no_files(bucket):
    """Cloud Storage FUSE and the console make them."""
    folder = storage.path(f"{bucket}/placeholders")
    storage.write_whole(folder / "state" / "file", b"data")
    before = storage.checksums(folder)
    server = f"{os.environ['STORAGE_EMULATOR_HOST']}/upload/storage/v1/b/bucket/o?uploadType=media"
    for name in ("", "state/", "empty/"):
        assert requests.post(f"{server}&name=placeholders/{name}", data=b"").ok
    assert storage.files_under(folder) == ["state/file"] and storage.checksums(folder) == before
    assert storage.find_files(folder, lambda name: True) == [folder / "state" / "file"]
    assert storage.total_size(folder) == 4


def test_an_interrupted_save_on_the_store_is_removed(bucket):
    """Orbax writes a step of a store in its place; it stayed there for ever when the process was killed."""
    state, place = {"params": {"a": np.ones(4, np.float32)}}, storage.path(f"{bucket}/interrupted/checkpoints")
    for steps in ((1, 2), (3,)):
        checkpoints = Checkpoints(f"{bucket}/interrupted")
        for step in steps:
            checkpoints.save(step, jax.tree.map(jax.numpy.asarray, state), {})
        checkpoints.close()
        for name in ("commit_success.txt", "digests.json") if steps == (1, 2) else ():
            (place / "2" / name).unlink()  # as if the process had been killed before it wrote them
    assert sorted(storage.children(place)) == ["1", "3"]


def test_a_store_that_does_not_answer_is_not_a_damaged_checkpoint(run, bucket):
    """An older checkpoint was used when a request for the newest one failed."""
    put(run / "text", f"{bucket}/refused/text")
    faults(forbid="30/digests.json")
    try:
        with pytest.raises(StorageError, match="refuses or cannot be reached"):
            find(f"{bucket}/refused/text")
        with pytest.raises(StorageError, match="refuses or cannot be reached"):
            Checkpoints(f"{bucket}/refused/text").newest()
    finally:
        faults()
    assert find(f"{bucket}/refused/text").name == "30"


# ---- Weights and self-enhancement ------------------------------------------------------------------------------------


def test_weights_on_the_store_are_imported_to_the_store(bucket, tmp_path):
    language("llama", layers=1).save_pretrained(tmp_path / "peer")
    put(tmp_path / "peer", f"{bucket}/weights/peer")
    import_weights(str(tmp_path / "peer"), str(tmp_path / "imported"), codes=32)
    import_weights(f"{bucket}/weights/peer", f"{bucket}/weights/imported", codes=32)
    places = (tmp_path / "imported", f"{bucket}/weights/imported")
    one, other = (jax.tree.leaves(read_params(find(place))) for place in places)
    assert len(one) > 0 and all(np.array_equal(x, y) for x, y in zip(one, other, strict=True))
    with pytest.raises(DataError, match="imported is not empty; give another --output"):
        import_weights(f"{bucket}/weights/peer", f"{bucket}/weights/imported", codes=32)
    file = storage.path(f"{bucket}/weights/peer/model.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(WeightsFileError, match=f"^{file} is truncated"):
        import_weights(f"{bucket}/weights/peer", f"{bucket}/weights/again", codes=32)
    with pytest.raises(WeightsFileError, match="there is no file or directory gs://bucket/weights/none"):
        import_weights(f"{bucket}/weights/none", f"{bucket}/weights/again", codes=32)


def contents(folder):
    return {name: storage.read(storage.path(folder) / name) for name in storage.files_under(storage.path(folder))}


@pytest.mark.parametrize("store", ["bucket", "s3_bucket"])
def test_self_enhancement_on_a_store_gives_the_local_documents(store, request, tmp_path, monkeypatch):
    bucket = request.getfixturevalue(store)
    monkeypatch.setattr(drawings, "BLOCK", 8)
    found = {}
    for place in (str(tmp_path), f"{bucket}/enhancement"):
        drawn, stored = write_drawings(storage.path(f"{place}/drawings"), 20)
        monkeypatch.setattr(building.Records, "open", lambda path, stored=stored: stored)
        assess(str(drawn.path), "scenes")
        if storage.is_remote(place):  # an interrupted run
            (drawn.path / "verdicts" / "verdicts-0.jsonl").write_bytes(
                b"".join((drawn.path / "verdicts" / "verdicts-0.jsonl").read_bytes().splitlines(True)[:7]) + b'{"ind'
            )
            assert assess(str(drawn.path), "scenes")["assessed"] == 20
            (storage.path(f"{place}/built/images") / "00000000.png").write_bytes(b"part of an interrupted copy")
        building.build(str(drawn.path), "records", f"{place}/built")
        found[place] = contents(f"{place}/built"), contents(f"{place}/drawings")
    (local, local_drawn), (remote, remote_drawn) = found.values()
    assert local == remote and len(local) > 20
    assert local_drawn == remote_drawn
    storage.write_whole(storage.path(f"{bucket}/other/file"), b"")
    with pytest.raises(DataError, match="other is not empty; remove it or give another --output"):
        building.build(f"{bucket}/enhancement/drawings", "records", f"{bucket}/other")


def test_a_journal_on_the_store_is_copied_now_and_then_and_has_one_writer(bucket, monkeypatch):
    folder, verdict = storage.path(f"{bucket}/journal"), Verdict("a circle", True, True, True, True)
    first = Journal(folder, 0)
    first.write(0, verdict, 0.5)
    assert not read_verdicts(folder)  # of a run that is killed within the first seconds
    monkeypatch.setattr("unimm_jax.enhancement.journal.COPY_SECONDS", 0.0)
    first.write(1, verdict, 0.75)
    assert sorted(read_verdicts(folder)) == [0, 1]
    second = Journal(folder, 0)
    assert second.spent == 0.75
    second.write(2, verdict, 1.0)
    with pytest.raises(DataError, match="another run writes gs://bucket/journal/verdicts-0.jsonl"):
        first.write(3, verdict, 1.0)
    second.close()
    assert sorted(read_verdicts(folder)) == [0, 1, 2]


# ---- s3:// -----------------------------------------------------------------------------------------------------------


def test_records_and_exports_can_be_on_s3_and_checkpoints_cannot(run, s3_bucket, tmp_path, capsys, no_local_copies):
    write_random_records(tmp_path / "records", 20)
    write_random_records(storage.path(f"{s3_bucket}/records"), 20)
    one, other = Records(tmp_path / "records"), Records(f"{s3_bucket}/records")
    assert len(one) == len(other) == 20 and one.header == other.header
    for i in range(len(one)):
        a, b = one[i], other[i]
        assert a.images == b.images and a.texts == b.texts and np.array_equal(a.codes, b.codes)
    export(str(run / "stage3"), f"{s3_bucket}/hf", verify=False)
    assert {"model.safetensors", "config.json"} <= set(storage.files_under(storage.path(f"{s3_bucket}/hf")))
    with pytest.raises(CheckpointError, match="on local disks and gs:// only"):
        train(with_records("stage3", run), f"{s3_bucket}/stage3")
    with pytest.raises(CheckpointError, match="on local disks and gs:// only"):
        find(f"{s3_bucket}/stage3")
    sums = storage.checksums(storage.path(f"{s3_bucket}/records"))
    assert storage.checksums(tmp_path / "records", sums) == sums


def test_a_store_with_the_interface_of_s3_that_fails_now_and_then_loses_nothing(s3_bucket, s3_faults, tmp_path):
    """A fifth of the requests get 503 or half of the body."""
    write_random_records(tmp_path / "records", 20)
    write_random_records(storage.path(f"{s3_bucket}/faulty"), 20)
    one, other = Records(tmp_path / "records"), Records(f"{s3_bucket}/faulty")
    assert one.header == other.header
    for i in range(len(one)):
        assert one[i].images == other[i].images and one[i].texts == other[i].texts
    for i in range(60):
        file = storage.path(f"{s3_bucket}/many/{i}")
        storage.write_whole(file, bytes([i]) * 1000)
        assert storage.read(file) == bytes([i]) * 1000
    assert min(s3_faults.values()) > 0, s3_faults
