"""launch/tpu.py against a stand-in for gcloud whose hosts are directories and processes of this machine."""

import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib

import jax
import numpy as np
import pytest
from helpers import ROOT, arguments, free_port, link, xla_flags

from launch import tpu
from unimm_jax import metrics, storage
from unimm_jax.checkpoint import find, read_params

INSTALL = (  # in place of a virtual environment
    f"mkdir -p venv/bin && printf '#!/bin/sh\\nexec {sys.executable} \"$@\"\\n' > venv/bin/python && "
    "chmod +x venv/bin/python"
)
TRAIN = ("--provisioning=spot", "--type=v5p-16")


@pytest.fixture
def stub(tmp_path):
    """The directory of a stand-in for gcloud with two hosts per node."""
    folder = tmp_path / "stub"
    folder.mkdir()
    (folder / "workers").write_text("2")
    (folder / "gcloud").write_text(f'#!/bin/sh\nexec {sys.executable} -S -E {ROOT}/tests/stub_gcloud.py "$@"\n')
    (folder / "gcloud").chmod(0o755)
    return folder


def line(stub, *flags, command=("true",), name="run", zone="us-west4-a"):
    found = [sys.executable, str(ROOT / "launch" / "tpu.py"), flags[0], name, f"--zone={zone}", *flags[1:]]
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    env |= {"STUB": str(stub), "PATH": f"{stub}:{env['PATH']}", "PYTHONPATH": ""}
    return [*found, *(["--", *command] if command else [])], env


def launch(stub, *flags, **options):
    """Runs the launcher to its end."""
    words, env = line(stub, *flags, **options)
    return subprocess.run(words, env=env, capture_output=True, text=True, timeout=240)


def calls(stub):
    return [json.loads(text) for text in (stub / "log").read_text().splitlines()]


def up(stub, *flags, **options):
    return launch(stub, "up", *TRAIN, "--poll=0.1", f"--install={INSTALL}", *flags, **options)


def test_a_command_runs_on_every_host_and_the_log_of_the_first_is_shown(stub):
    command = ("bash", "-c", 'echo "host $JAX_PROCESS_ID of $NAME in $(basename "$PWD")"; ls pyproject.toml')
    done = up(stub, "--env=NAME=a b", "--delete", command=command)
    assert done.returncode == 0, done.stderr
    assert "host 0 of a b in src\npyproject.toml" in done.stdout and "host 1" not in done.stdout
    assert "WAITING_FOR_RESOURCES after" in done.stdout and "ACTIVE after" in done.stdout
    assert "8 chips" in done.stdout and "chip-hours" in done.stdout
    assert (stub / "hosts" / "run-1" / "unimm" / "log").read_text().startswith("host 1 of a b in src")
    made = next(words for words in calls(stub) if "create" in words)
    assert {"--spot", "--accelerator-type=v5p-16", "--runtime-version=v2-alpha-tpuv5", "--node-id=run"} <= set(made)
    assert "delete" in calls(stub)[-1] and not (stub / "request.json").exists()
    assert "a b" not in (stub / "log").read_text()  # variables may be secrets
    assert (stub / "hosts" / "run-0" / "unimm" / "env").stat().st_mode & 0o077 == 0


@pytest.mark.slow
def test_training_goes_on_after_preemption_with_the_same_bits(run, stub, tmp_path):
    """Two hosts are processes of one run; both are killed and their disks are emptied; the TPU is requested again."""
    changes = dict(train__steps=24, train__checkpoint_every=4, train__log_every=1)
    env = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(2), "JAX_NUM_PROCESSES": "2"}
    env["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{free_port()}"

    def words(name):
        root = link(run, tmp_path / name, "encoder")
        command = ["python", "-m", "unimm_jax.main", "--config=selector:laptop", f"--workdir={root / 'selector'}"]
        given = [f"--env={key}={value}" for key, value in env.items()]
        return line(stub, "up", *TRAIN, "--poll=0.2", f"--install={INSTALL}", *given,
                    command=[*command, *arguments("selector", **changes)])  # fmt: skip

    def follow(name, preempt_at):
        command, variables = words(name)
        said = ""
        with subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as p:
            for text in p.stdout:
                said += text
                if preempt_at and f" {preempt_at}/24" in text:
                    preempt(stub)
                    preempt_at = 0
        assert p.returncode == 0, said[-3000:]
        return said

    assert "is lost" not in follow("whole", 0)
    (stub / "request.json").unlink()
    said = follow("preempted", 10)
    assert len(re.findall("is lost: the request is SUSPEND(ING|ED); attempt 2", said)) == 1, said[-3000:]
    assert said.count("ACTIVE after") == 2 and " 24/24" in said
    whole, broken = tmp_path / "whole" / "selector", tmp_path / "preempted" / "selector"
    losses = [np.array([row["loss"] for row in metrics.read(place)]) for place in (whole, broken)]
    assert np.array_equal(*losses) and len(losses[0]) == 24
    params = [jax.tree.leaves(read_params(find(place))) for place in (whole, broken)]
    assert len(params[0]) and all(np.array_equal(a, b) for a, b in zip(*params, strict=True))


def preempt(stub):
    """Kills what runs on the hosts, as a machine that is switched off does, and ends the request."""
    found = json.loads((stub / "request.json").read_text())
    for file in (stub / "hosts").glob("*/unimm/pid"):
        os.killpg(int(file.read_text()), signal.SIGKILL)
    (stub / "request.json").write_text(json.dumps(found | {"state": "SUSPENDING"}))


def test_a_second_line_follows_the_run_that_goes_on(stub, tmp_path):
    command = ("bash", "-c", f"echo begun >> {tmp_path}/count; for i in 1 2 3; do echo line $i; sleep 1; done")
    words, env = line(stub, "up", *TRAIN, "--poll=0.1", f"--install={INSTALL}", command=command)
    with subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True) as first:
        next(text for text in first.stdout if "line 1" in text)
        first.kill()
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "line 1\nline 2\nline 3" in done.stdout
    assert (tmp_path / "count").read_text() == "begun\n" * 2  # once on each host
    assert sum("create" in words for words in calls(stub)) == 1


def test_a_command_that_fails_on_one_host_is_named(stub):
    done = up(stub, command=("bash", "-c", "exit $((3 * JAX_PROCESS_ID))"))
    assert done.returncode == 3
    assert "run run-w-1: the command ended with status 3" in done.stdout and "run-w-0" not in done.stdout


def test_a_stop_by_sigterm_starts_the_command_again(stub, tmp_path):
    file = tmp_path / "once"
    script = f'[ "$JAX_PROCESS_ID" = 1 ] && exit 0; [ -e {file} ] && exit 0; touch {file}; exit 143'
    done = up(stub, command=("bash", "-c", script))
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("stopped by SIGTERM on run run-w-0; attempt 2") == 1


@pytest.mark.parametrize("status", [75, "gone"])
def test_a_lost_host_starts_the_command_again_on_all_hosts(stub, tmp_path, status):
    """The other host, which would wait for the lost one, is stopped."""
    end = 'kill -9 -- -"$(cat ../pid)"' if status == "gone" else f"exit {status}"
    script = f'echo >> {tmp_path}/$JAX_PROCESS_ID; [ "$(wc -l < {tmp_path}/$JAX_PROCESS_ID)" = 2 ] && exit 0; '
    script += f'[ "$JAX_PROCESS_ID" = 0 ] && sleep 1000; {end}'
    code = (
        "import launch.tpu as tpu, sys; tpu.STUCK_SECONDS = 1; tpu.FOLLOW_SECONDS = 1; sys.exit(tpu.main(sys.argv[1:]))"
    )
    words, env = line(stub, "up", *TRAIN, "--poll=0.1", f"--install={INSTALL}", command=("bash", "-c", script))
    done = subprocess.run([sys.executable, "-c", code, *words[2:]], env=env, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout
    why = "is gone" if status == "gone" else "lost another host"
    assert done.stdout.count(f"the command {why} on run run-w-1; attempt 2 of 101") == 1
    assert all((tmp_path / host).read_text() == "\n\n" for host in "01")


def test_a_failure_of_the_command_counts_more_than_the_loss_of_its_host_and_shows_the_log(stub):
    script = '[ "$JAX_PROCESS_ID" = 0 ] && exit 75; for i in $(seq 50); do echo "line $i"; done; exit 7'
    done = up(stub, "--delete", command=("bash", "-c", script))
    assert done.returncode == 7 and "is lost" not in done.stdout
    shown = done.stdout.partition("---- the last lines of run run-w-1:\n")[2].splitlines()
    assert shown[:30] == [f"line {i}" for i in range(21, 51)] and "run-w-0:\n" not in done.stdout
    assert not (stub / "request.json").exists()  # deleted after the logs were shown


def test_errors_of_gcloud_that_pass_do_not_end_a_run(stub):
    passing = "WARNING: unexpected quota issues\nERROR: (gcloud) UNAVAILABLE: The service is currently unavailable.\n"
    (stub / "fail_once").write_text(json.dumps([["describe", passing]] * 3 + [["create", passing]]))
    done = up(stub)
    assert done.returncode == 0 and done.stdout.count("currently unavailable.; trying again") == 4, done.stderr


def test_a_run_outlives_the_network_of_the_launcher(stub, tmp_path, monkeypatch, capsys):
    """The launcher waits until Google Cloud answers again, and does not delete the TPU under the command."""
    monkeypatch.setenv("STUB", str(stub))
    monkeypatch.setenv("PATH", f"{stub}:{os.environ['PATH']}")
    monkeypatch.setattr(tpu, "FOLLOW_SECONDS", 1)
    say = tpu.say

    def back(text):
        say(text)
        if "what runs on the TPU goes on" in text:
            (stub / "offline").unlink()
            (tmp_path / "end").touch()

    monkeypatch.setattr(tpu, "say", back)
    script = f"[ $JAX_PROCESS_ID = 0 ] || {{ sleep 0.5; touch {stub}/offline; }}; "
    script += f"while [ ! -e {tmp_path}/end ]; do sleep 0.1; done; echo done"
    flags = ["up", "run", "--zone=us-west4-a", *TRAIN, "--poll=0.1", "--delete", f"--install={INSTALL}"]
    assert tpu.main([*flags, "--", "bash", "-c", script]) == 0
    said = capsys.readouterr().out
    assert "timed out; waiting until Google Cloud answers" in said and "is lost" not in said and "\ndone\n" in said
    assert sum("create" in words for words in calls(stub)) == 1 and not (stub / "request.json").exists()


def test_a_tpu_that_cannot_be_asked_for_is_not_deleted(stub, monkeypatch, capsys):
    monkeypatch.setenv("STUB", str(stub))
    monkeypatch.setenv("PATH", f"{stub}:{os.environ['PATH']}")
    (stub / "request.json").write_text(json.dumps({"state": "ACTIVE", "nodes": ["run"], "type": "v5p-16"}))
    real = tpu.Tpu._describe

    def describe(self):
        (stub / "offline").touch()
        try:
            return real(self)
        finally:
            (stub / "offline").unlink()  # the network is back, and a deletion would succeed

    monkeypatch.setattr(tpu.Tpu, "_describe", describe)
    flags = ["up", "run", "--zone=us-west4-a", "--type=v5p-16", "--poll=0.001", "--delete", "--", "true"]
    assert tpu.main(flags) == 1
    said = capsys.readouterr()
    assert "timed out" in said.err and "if there is a TPU, it is charged for" in said.out
    assert (stub / "request.json").exists() and not any("delete" in words for words in calls(stub))


def test_a_failed_command_is_stopped_on_the_other_hosts(stub, tmp_path, monkeypatch, capsys):
    """So that a corrected command starts on all hosts. A process may save before it ends, as training does."""
    monkeypatch.setenv("STUB", str(stub))
    monkeypatch.setenv("PATH", f"{stub}:{os.environ['PATH']}")
    monkeypatch.setattr(tpu, "STUCK_SECONDS", 0.5)
    script = f'[ "$JAX_PROCESS_ID" = 0 ] && exit 3; trap "sleep 2; echo stopped > {tmp_path}/stopped; exit 143" TERM; '
    script += "for i in $(seq 600); do sleep 0.1; done"
    flags = ["up", "run", "--zone=us-west4-a", *TRAIN, "--poll=0.1", f"--install={INSTALL}", "--", "bash", "-c", script]
    assert tpu.main(flags) == 3
    assert (tmp_path / "stopped").exists() and "stopping the command on the other hosts" in capsys.readouterr().out


def test_a_process_that_does_not_end_is_killed(tmp_path):
    """The shell that the launcher starts ends at SIGTERM; the command does not, and has a session of its own."""
    tree = tmp_path / tpu.TREE
    (tree / "src").mkdir(parents=True)
    (tmp_path / "unimm_jax.env").touch()
    env = os.environ | {"HOME": str(tmp_path)}

    def on_host(script):
        return subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, check=True).stdout

    ignores = "import signal, time; signal.signal(15, signal.SIG_IGN); print('begun', flush=True); time.sleep(600)"
    on_host(tpu.start_script(["bash", "-c", f"setsid {sys.executable} -c {shlex.quote(ignores)} & sleep 600"]))
    while "begun" not in (tree / "log").read_text():
        time.sleep(0.05)
    with pytest.raises(subprocess.CalledProcessError):
        on_host(tpu.STOP_SCRIPT.replace("TERM KILL", "TERM").replace("seq 60", "seq 1"))
    assert "running" in on_host(tpu.STATUS_SCRIPT)
    on_host(tpu.STOP_SCRIPT.replace("seq 60", "seq 1"))
    assert on_host(tpu.STATUS_SCRIPT).endswith(f" {tpu.GONE}\n")


def test_a_failed_installation_is_repeated(tmp_path):
    """Also when the version before it is installed again."""
    (tmp_path / "files").mkdir()
    subprocess.run(["tar", "-czf", tmp_path / "unimm_jax.tar.gz", "-C", tmp_path / "files", "."], check=True)

    def install(command, mark):
        line = ["bash", "-c", tpu.install_script(command, mark)]
        return subprocess.run(line, env=os.environ | {"HOME": str(tmp_path)}, capture_output=True).returncode

    assert install("echo >> $HOME/done", "a") == 0 and install("exit 3", "b") == 3
    assert install("echo >> $HOME/done", "a") == 0 and install("exit 3", "a") == 0
    assert (tmp_path / "done").read_text() == "\n\n"


def test_a_refusal_after_a_preemption_is_tried_again(stub, tmp_path):
    script = (
        f"[ -e {tmp_path}/second ] && exit 0; [ $JAX_PROCESS_ID = 0 ] && touch {tmp_path}/second; echo begun; sleep 60"
    )
    words, env = line(stub, "up", *TRAIN, "--poll=0.1", f"--install={INSTALL}", command=("bash", "-c", script))
    with subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True) as process:
        next(text for text in process.stdout if "begun" in text)
        no_capacity = "ERROR: (gcloud.compute.tpus.queued-resources.create) There is no more capacity in the zone"
        (stub / "fail_once").write_text(json.dumps([["create", no_capacity]] * 2))
        preempt(stub)
        said = process.stdout.read()
    assert process.returncode == 0 and said.count("no more capacity") == 2, said


def test_a_request_that_always_fails_ends_the_run_with_the_reason(stub):
    (stub / "fail_request").write_text("the zone has no such machines")
    done = up(stub, "--delete")
    assert done.returncode == 1 and "3 requests in a row failed: the zone has no such machines" in done.stderr
    assert sum("create" in words for words in calls(stub)) == 3 and not (stub / "request.json").exists()


def test_a_request_that_waited_for_long_enough_ends_the_run(stub, monkeypatch, capsys):
    monkeypatch.setenv("STUB", str(stub))
    monkeypatch.setenv("PATH", f"{stub}:{os.environ['PATH']}")
    clock = itertools.count(0, 3600)
    monkeypatch.setattr(tpu.time, "monotonic", lambda: next(clock))
    (stub / "fail_request").write_text("expired")
    flags = ["up", "run", "--zone=us-west4-a", "--poll=0.01", "--wait-hours=1", "--", "true"]
    assert tpu.main(flags) == 1
    assert "waited for 1 h (--wait-hours)" in capsys.readouterr().err


def test_a_request_that_was_made_although_gcloud_failed_is_used(stub):
    words = ["compute", "tpus", "queued-resources", "create", "run", "--accelerator-type=v5p-16", "--node-id=run"]
    _, env = line(stub, "up")
    subprocess.run([str(stub / "gcloud"), *words], env=env, check=True)
    request = (stub / "request.json").read_text()
    (stub / "request.json").unlink()
    timed_out = "ERROR: (gcloud) DEADLINE_EXCEEDED: no answer"
    (stub / "fail_once").write_text(json.dumps([["create", timed_out, request]]))
    done = up(stub)
    assert done.returncode == 0, done.stderr


def test_a_tpu_of_another_type_is_refused(stub):
    assert up(stub).returncode == 0
    done = launch(stub, "up", "--type=v6e-8", "--poll=0.1", "--delete")  # the other TPU may be running a command
    assert done.returncode == 1 and "is of the type v5p-16" in done.stderr and done.stderr.count("\n") == 1
    done = up(stub, "--slices=2", "--delete")
    assert (stub / "request.json").exists() and not any("delete" in words for words in calls(stub))
    assert (
        done.returncode == 1 and "requested with --slices=1; give that" in done.stderr and done.stderr.count("\n") == 1
    )


def test_a_host_without_a_status_counts_as_gone_and_the_tpu_is_deleted(stub):
    script = 'echo > "$HOME/unimm/status"; kill -9 $PPID'  # as on a full disk
    done = up(stub, "--retries=1", "--delete", command=("bash", "-c", script))
    assert done.returncode == 1 and "the command is gone" in done.stderr, done.stderr
    assert "delete" in calls(stub)[-1] and not (stub / "request.json").exists()


def test_an_error_that_lasts_deletes_the_tpu_if_wanted(stub):
    (stub / "unreachable").write_text("1")
    done = up(stub, "--retries=1", "--delete")
    assert done.returncode == 1 and "delete" in calls(stub)[-1] and not (stub / "request.json").exists()


def test_lines_of_the_log_come_once_when_a_connection_breaks(stub):
    (stub / "repeat").write_text("1.5")
    script = "for i in 1 2 3 4 5 6; do echo line $i; sleep 0.5; done"
    done = up(stub, command=("bash", "-c", script))
    assert re.findall(r"^line (\d)$", done.stdout, re.M) == list("123456")
    shown = launch(stub, "logs", "--worker=1", command=())
    assert re.findall(r"^line (\d)$", shown.stdout, re.M) == list("123456") and shown.returncode == 0


def test_nothing_is_installed_under_a_running_command(stub, tmp_path):
    script = f"echo begun >> {tmp_path}/count; echo begun; sleep 4; ls pyproject.toml || exit 9"
    words, env = line(stub, "up", *TRAIN, "--poll=0.1", f"--install={INSTALL}", command=("bash", "-c", script))
    with subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True) as first:
        next(text for text in first.stdout if "begun" in text)
        first.kill()
    other = f"--install=touch {tmp_path}/installed; {INSTALL}"  # as after another commit
    done = launch(stub, "up", *TRAIN, "--poll=0.1", other, command=("bash", "-c", script))
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "count").read_text() == "begun\n" * 2 and not (tmp_path / "installed").exists()


def test_another_command_is_not_taken_for_the_one_that_runs(stub, tmp_path):
    words, env = line(stub, "up", *TRAIN, "--poll=0.1", f"--install={INSTALL}",
                      command=("bash", "-c", "echo begun; sleep 60"))  # fmt: skip
    with subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True) as first:
        next(text for text in first.stdout if "begun" in text)
        first.kill()
    done = up(stub, "--delete", command=("touch", str(tmp_path / "second")))
    assert done.returncode == 1 and "another command is running on run; stop it" in done.stderr
    assert done.stderr.count("\n") == 1 and (stub / "request.json").exists()
    assert launch(stub, "stop", "--type=v5p-16", command=()).returncode == 0
    done = up(stub, command=("touch", str(tmp_path / "second")))
    assert done.returncode == 0 and (tmp_path / "second").exists(), done.stdout


def test_lines_for_the_same_tpu_name_its_slices_and_project():
    flags = ["up", "run", "--zone=z", "--slices=2", "--project=p"]
    settings = tpu.settings_of(tpu.parser().parse_args(flags), ["true"])
    assert settings.line("stop") == "python launch/tpu.py stop run --zone=z --project=p --slices=2"


def test_a_log_can_have_any_bytes(stub):
    done = up(stub, command=("bash", "-c", r"printf 'a\xffb\nc\n'"))
    assert done.returncode == 0 and "a\ufffdb\nc\n" in done.stdout, done.stdout


def test_what_is_no_clone_is_refused_before_a_tpu_is_requested(stub, tmp_path):
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    words, env = line(stub, "up", *TRAIN)
    done = subprocess.run([words[0], str(tmp_path / "launch" / "tpu.py"), *words[2:]], env=env, capture_output=True)
    assert done.returncode == 1 and b"install needs a git clone" in done.stderr and not (stub / "log").exists()


@pytest.mark.parametrize(
    "said, remedy",
    [
        ("Permission 'tpu.queuedresources.create' denied on resource '//x/projects/p/locations/z'", "roles/tpu.admin"),
        ("Request had insufficient authentication scopes.", "gcloud auth login"),
        ("Quota limit 'TPUV5sLitepodPerProjectPerZoneForTPUAPI' has been exceeded. Limit: 0 in zone.", "more quota"),
        ('There is no more capacity in the zone "us-west4-a"', "try again later"),
        ("PERMISSION_DENIED: Cloud TPU API has not been used in project 1 before", "enable tpu.googleapis.com"),
    ],
)
def test_refusals_of_gcloud_are_one_line_with_a_remedy(stub, said, remedy):
    (stub / "fail_create").write_text(f"ERROR: (gcloud.compute.tpus.queued-resources.create) {said}\nmore\n")
    done = up(stub)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert said.split(".")[0] in done.stderr and remedy in done.stderr


def test_a_wrong_zone_is_one_line(stub):
    done = up(stub, zone="us-nowhere1-z")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "locations/us-nowhere1-z" in done.stderr and "--zone" in done.stderr


def test_a_host_without_ssh_is_named(stub):
    (stub / "unreachable").write_text("1")
    done = up(stub, "--retries=1")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "lost 2 times, the last time because worker 1 of run: ERROR" in done.stderr


def test_an_installation_that_always_fails_ends_the_run(stub):
    done = launch(stub, "up", *TRAIN, "--poll=0.01", "--install=echo no such package >&2; false && true")
    assert done.returncode == 1 and "was lost 10 times" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "flags, part",
    [
        (dict(name="Run"), "lower-case"),
        (dict(command=()), "needs the command after --"),
        (dict(more="--slices=0"), "--slices=0 is below 1"),
        (dict(more="--retries=-1"), "--retries=-1 is below 0"),
    ],
)
def test_wrong_flags_are_one_line(stub, flags, part):
    done = up(stub, *[more] if (more := flags.pop("more", "")) else [], **flags)
    assert done.returncode == 1 and part in done.stderr and done.stderr.count("\n") == 1


def test_unknown_types_are_listed(stub):
    done = launch(stub, "up", "--type=v5e-7")
    assert done.returncode == 1 and "v5litepod-16" in done.stderr and not (stub / "log").exists()


def test_a_dry_run_prints_the_commands_and_runs_none(stub):
    flags = ("--slices=2", "--provisioning=flex-start", "--hours=8", "--dry-run", "--delete")
    done = launch(stub, "up", *flags, "--type=v6e-8", command=("python", "-c", "print('a b')"))
    assert done.returncode == 0 and not (stub / "log").exists(), done.stderr
    lines = [text for text in done.stdout.splitlines() if text.startswith("gcloud")]
    assert "--node-count=2 --node-prefix=run" in lines[0] and "--max-run-duration=8h" in lines[0]
    assert lines[0].startswith("gcloud alpha ") and "valid-until" not in lines[0]
    assert ["run-0" in text or "run-1" in text for text in lines] == [False, *[True] * 9, False]
    assert lines[-1].split()[3:5] == ["queued-resources", "delete"]
    words, env = line(stub, "up", *flags, "--type=v6e-8", command=("python", "-c", "print('a b')"))
    alone = subprocess.run([words[0], "-S", "-E", *words[1:]], env=env, capture_output=True, text=True)
    assert alone.returncode == 0 and alone.stdout.count("gcloud") == done.stdout.count("gcloud")  # no packages needed


@pytest.mark.parametrize(
    "flags",
    [
        ("skypilot", "--slices=2"),
        ("skypilot", "--provisioning=reserved"),
        ("jobset", "--provisioning=flex-start"),
        ("jobset", "--provisioning=reserved"),
        ("xpk", "--provisioning=spot"),
    ],
)
def test_what_another_launcher_cannot_do_is_refused(stub, flags):
    done = launch(stub, "render", f"--target={flags[0]}", flags[1])
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and not done.stdout
    assert flags[1].partition("=")[0] in done.stderr and "; give " in done.stderr


@pytest.mark.parametrize("provisioning", ["on-demand", "spot", "reserved", "flex-start"])
def test_requests_have_flags_that_their_track_of_gcloud_knows(stub, provisioning):
    done = launch(stub, "create", f"--provisioning={provisioning}", "--wait-hours=3", "--poll=0.1", command=())
    assert done.returncode == 0, done.stderr
    assert "--valid-until-duration=3h" in next(words for words in calls(stub) if "create" in words)


def test_hosts_get_the_packages_that_workdirs_on_gs_need(stub):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for step in (("up", "--dry-run"), ("render", "--target=skypilot")):
        installed = re.search(r"\[([\w,]+)\]'", launch(stub, *step, "--type=v6e-8").stdout).group(1).split(",")
        assert storage.PACKAGES["gs"] in {package for name in installed for package in extras[name]}, step
