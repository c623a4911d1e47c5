"""Several processes on loopback, as hosts of a pod would be: same losses, same data, one end."""

import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import ROOT, free_port, link, main_command, opened, with_records, xla_flags

from unimm_jax import distributed, metrics, runcard, sharding
from unimm_jax.checkpoint import read_meta
from unimm_jax.data import digests
from unimm_jax.errors import StartupError

DEVICES = 4


def launch(stage, workdir, processes, env=None, **changes):
    """Starts the processes of one run, `DEVICES` fake devices over all of them."""
    return start(main_command(stage, workdir, **changes), processes, env)


def start(command, processes, env=None):
    """Starts a command as several processes, `DEVICES` fake devices over all of them."""
    address = f"127.0.0.1:{free_port()}"
    found = []
    for index in range(processes):
        mine = {name: value for name, value in os.environ.items() if name != "UNIMM_TRACEBACK"} | {
            "XLA_FLAGS": xla_flags(DEVICES // processes),
            "JAX_PLATFORMS": "cpu",
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": str(processes),
            "JAX_PROCESS_ID": str(index),
        }
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        found.append(subprocess.Popen(command, cwd=ROOT, env=mine | (env or {}), **pipes))
    return found


def finish(processes, timeout=240):
    """Waits for all; returns what each said."""
    said = [p.communicate(timeout=timeout)[0] for p in processes]
    assert all(p.returncode == 0 for p in processes), "\n".join(text[-4000:] for text in said)
    return said


def place(run, root):
    return link(run, root, "records", "stage2", "tokenizer", "selector")


def losses(workdir):
    return np.array([row["loss"] for row in metrics.read(workdir)])


# a constant rate, so that a run may stop anywhere and resume with other numbers of steps
LM = dict(train__checkpoint_every=100, optimizer__schedule="constant", optimizer__warmup=1e-9)


def check(run, root, plans):
    """Runs each plan, [(steps, processes), ...], and compares its losses with those of one process."""
    place(run, root)
    one = np.zeros(20)
    for plan in [[(20, 1)], *plans]:
        home = root / "-".join(f"{s}x{n}" for s, n in plan)
        for steps, count in plan:
            finish(launch("stage3", home, count, train__steps=steps, **LM))
        found = losses(home)
        one = one if one.any() else found
        assert len(found) == 20 and np.abs(found / one - 1).max() < 1e-5, plan


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_one_two_and_four_processes_are_the_same(run, tmp_path):
    """Losses of 20 steps within 1e-5, also if the number changes in between.

    pytest -m slow tests/integration/test_distributed.py -k one_two_and_four
    """
    check(run, tmp_path / "root", [[(20, 2)], [(20, 4)], [(8, 2), (14, 4), (20, 1)]])


def test_every_process_reads_its_part_of_one_order(run):
    """Shares of 1, 2 and 4 processes put together are the global batch, row by row, from any step on."""
    for stage in ("stage3", "selector", "pixel_decoder"):
        data, _ = opened(with_records(stage, run))
        whole = data.iterate(multiple=4)
        batches = [next(whole) for _ in range(3)]
        state = None
        for count in (1, 2, 4):  # a change of the number in the middle: the state of one continues in the next
            shares = [lambda size, i=i, n=count: np.arange(size).reshape(n, -1)[i] for i in range(count)]
            parts = [data.iterate(share, multiple=4) for share in shares]
            if state is not None:
                for part in parts:
                    part.set_state(state)
            found = [next(part) for part in parts]
            step = {1: 0, 2: 1, 4: 2}[count]
            for key, wanted in batches[step].items():
                assert np.array_equal(np.concatenate([f[key] for f in found]), wanted), (stage, key, count)
            state = parts[0].get_state()


def two_under_way(run, tmp_path):
    """Two processes of one long run, after its first line: (directory, processes)."""
    root = place(run, tmp_path / "root")
    processes = launch("stage3", root / "x", 2, train__steps=100_000, **LM)
    next(line for line in processes[0].stdout if "/100000" in line)
    return root, processes


def test_sigterm_on_one_process_stops_all_at_one_step(run, tmp_path):
    root, processes = two_under_way(run, tmp_path)
    processes[1].send_signal(signal.SIGTERM)
    said = [p.communicate(timeout=120)[0] for p in processes]
    assert [p.returncode for p in processes] == [143, 143], said
    steps = {text.split("saved step ")[1].split(";")[0] for text in said}
    assert len(steps) == 1 and read_meta(root / "x")["step"] == int(steps.pop()) > 0
    # the run card, to which both processes contribute, has the digests of the whole batches
    data, _ = opened(with_records("stage3", run, train__steps=100_000, **LM))
    found = runcard.read(root / "x")["steps"]
    assert [step["step"] for step in found] == list(range(1, len(found) + 1)) and found
    for i, step in enumerate(found):
        whole = digests.of_batch(digests.of_rows(data, data.batch(i, multiple=DEVICES)))
        assert {name: step[name] for name in whole} == whole


@pytest.mark.slow
def test_processes_make_up_an_evaluation_that_a_stop_skipped(run, tmp_path):
    """As if two processes were stopped right after step 20, which is evaluated."""
    root, changes = place(run, tmp_path / "root"), dict(evals__held_out__every=10, train__steps=30)
    finish(launch("stage3", root / "x", 2, **changes))
    rows = metrics.read(root / "x", "evals.jsonl")
    assert [row["step"] for row in rows] == [10, 20, 30]
    shutil.rmtree(root / "x" / "checkpoints" / "30")
    (root / "x" / "evals.jsonl").write_text("")
    finish(launch("stage3", root / "x", 2, **changes))
    assert metrics.read(root / "x", "evals.jsonl") == rows[1:]


def test_processes_with_workdirs_of_their_own_stop_before_they_compile(run, tmp_path):
    """As on hosts whose disks are not shared: each has its own copies of the earlier stages, too."""
    address, processes = f"127.0.0.1:{free_port()}", []
    for index in range(2):
        root = link(run, tmp_path / f"host{index}", "selector")
        (root / "tokenizer").mkdir()
        (root / "tokenizer" / ".probe-0").write_bytes(b"")  # left by a process that was killed
        env = os.environ | {"XLA_FLAGS": xla_flags(1), "JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_ADDRESS": address}
        env |= {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(index)}
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        processes.append(subprocess.Popen(main_command("tokenizer", root / "tokenizer"), cwd=ROOT, env=env, **pipes))
    said = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [1, 1], said
    for text in said:
        assert "process 1 of 2 does not see the workdir" in text and "gs://" in text
        assert "parameters" not in text  # what is printed before the first compilation
    assert not list((tmp_path / "host0" / "tokenizer").glob(".probe*"))


@pytest.mark.slow
def test_two_processes_repeat_their_run(run, tmp_path):
    """pytest -m slow tests/integration/test_distributed.py -k repeat: bitwise, and the number of processes is named."""
    root = place(run, tmp_path / "root")
    finish(launch("stage3", root / "x", 2, train__steps=6, **LM))
    replay = [sys.executable, "-m", "unimm_jax.replay", str(root / "x")]
    said = finish(start([*replay, f"--output={root / 'y'}"], 2))
    assert said[0].splitlines()[-1] == "6 steps repeat bitwise"
    (alone,) = start(replay, 1)
    said = alone.communicate()[0].splitlines()
    assert alone.returncode == 1 and "processes 1, was 2" in said, said
    assert not any("differs (" in line for line in said)  # the batches are the same


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_others_with_a_message(run, tmp_path):
    _, processes = two_under_way(run, tmp_path)
    processes[1].kill()
    began = time.monotonic()
    said = processes[0].communicate(timeout=90)[0]
    assert time.monotonic() - began < 60
    assert processes[0].returncode == 75 and "error: another process of this run has ended" in said, said[-2000:]
    processes[1].wait()


@pytest.mark.slow
def test_an_evaluation_that_cannot_be_written_ends_all_with_a_message(run, tmp_path):
    """Only the first process writes; the other one does not take part in a save."""
    root = place(run, tmp_path / "root")
    processes = launch("stage3", root / "x", 2, train__steps=100_000, evals__held_out__every=300, **LM)
    next(line for line in processes[0].stdout if "/100000" in line)
    (root / "x" / "evals.jsonl").mkdir()
    said = [process.communicate(timeout=240)[0] for process in processes]
    assert processes[0].returncode == 1 and processes[1].returncode in (1, -signal.SIGABRT), said
    assert "error: " in said[0] and "there is a directory where a file is needed" in said[0]
    assert "Traceback (most recent call last)" not in said[0] + said[1]


def test_a_start_without_the_others_explains_itself(tmp_path):
    (process, other) = launch("encoder", tmp_path / "x", 2, env={"UNIMM_START_SECONDS": "5"})
    process.kill()  # the coordinator never comes
    process.wait()
    said = other.communicate(timeout=100)[0]
    assert other.returncode != 0
    assert "did not connect" in said and "firewall" in said and "process 1 of 2" in said, said[-2000:]


def test_wrong_numbers_of_processes_are_named(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    with pytest.raises(StartupError, match="not both numbers"):
        distributed.start()
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "2")
    with pytest.raises(StartupError, match="it is 0 to 1"):
        distributed.start()
    monkeypatch.setenv("JAX_NUM_PROCESSES", "1")
    distributed.start()  # alone: nothing to do


def test_the_watchdog_shows_what_hangs(capfd):
    watchdog = distributed.Watchdog(0.2)
    time.sleep(1.0)
    watchdog.close()
    said = capfd.readouterr().err
    assert said.count("Timeout (0:00:00.2") == 1 and "test_the_watchdog_shows_what_hangs" in said


def test_local_rows_are_those_of_this_process():
    mesh = sharding.make_mesh((1, -1, 1))
    assert sharding.local_rows(mesh, 8).tolist() == list(range(8))
