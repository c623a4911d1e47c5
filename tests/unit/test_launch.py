"""The scripts under launch/ and the configs beside them."""

import os
import re
import shutil
import signal
import subprocess

import pytest
from helpers import ROOT

from unimm_jax import resolve
from unimm_jax.data.sources import source_number, split_sources


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "launch").glob("*.sh")))
def test_scripts_have_no_syntax_errors(script):
    subprocess.run(["bash", "-n", str(ROOT / "launch" / script)], check=True)


# stands for Python: writes what a command of the scripts would, and kills the script at the call that DIE names
PYTHON = """#!/usr/bin/env bash
set -eu
echo "$*" >> "$LOG"
if [ "$(wc -l < "$LOG")" = "$DIE" ]; then kill -9 $PPID; exit 1; fi
case "$*" in
  *"unimm_jax.report "*) echo scores; exit ;;
  *"self_enhance assess"*) folder=$(sed 's/.*--drawings=\\([^ ]*\\).*/\\1/' <<< "$*")/verdicts ;;
  *) folder=$(sed 's/.*--\\(workdir\\|output\\)=\\([^ ]*\\).*/\\2/' <<< "$*") ;;
esac
mkdir -p "$folder"
touch "$folder/done.json"
"""


@pytest.mark.parametrize("script", ["quickstart.sh", "illume.sh"])
def test_a_killed_script_continues_where_it_was(script, tmp_path):
    """Killed at each of its commands once, it runs each command to its end once, in order."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    (tmp_path / "requirements.txt").touch()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "installed").touch()
    (tmp_path / ".venv" / "bin" / "python").write_text(PYTHON)
    (tmp_path / ".venv" / "bin" / "python").chmod(0o755)

    def run(name, die):
        places = dict(RUN=str(tmp_path / name), LOG=str(tmp_path / f"{name}.log"), DIE=str(die))
        command = ["bash", str(tmp_path / "launch" / script)]
        return subprocess.run(command, env=os.environ | places, capture_output=True, text=True)

    assert run("whole", 0).returncode == 0
    expected = (tmp_path / "whole.log").read_text().splitlines()
    assert len(expected) > 10
    for i in range(len(expected)):
        assert run("killed", 2 * i + 1).returncode == -signal.SIGKILL
    last = run("killed", 0)
    assert last.returncode == 0 and last.stdout == "scores\n", last.stderr
    found = (tmp_path / "killed.log").read_text().replace("/killed", "/whole").splitlines()
    assert found == [line for line in expected for _ in range(2)]  # killed in it, then whole
    commands = [(tmp_path / name / "commands.txt").read_text() for name in ("whole", "killed")]
    assert commands[0] == commands[1].replace("/killed", "/whole")
    assert run("whole", 0).returncode == 0
    again = (tmp_path / "whole.log").read_text().splitlines()[len(expected) :]
    assert again == [expected[-1]]  # the report only


@pytest.mark.parametrize("script", ["quickstart.sh", "illume.sh"])
def test_a_run_on_an_object_store_is_refused(script, tmp_path):
    """It would be a local directory gs:."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    line = ["bash", str(tmp_path / "launch" / script)]
    done = subprocess.run(line, env=os.environ | {"RUN": "gs://bucket/run"}, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: RUN is gs://bucket/run; give a local directory")
    assert not list(tmp_path.glob("gs:*"))


# stands for Python: makes a .venv, whose pip comes last, and kills the script in the command that DIE names
INSTALLING = """#!/usr/bin/env bash
set -eu
echo "$*" >> "$LOG"
die() { if [ "$DIE" = "$1" ]; then kill -9 $PPID; exit 1; fi; }
case "$*" in
  "-m venv .venv") mkdir -p .venv/bin; cp "$STUB" .venv/bin/python; die venv; touch .venv/pip ;;
  "-m pip "*) [ -e .venv/pip ]; case "$*" in *" install "*) die pip ;; esac ;;
  *unimm_jax*) exit 3 ;;
esac
"""


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh"])
def test_an_interrupted_installation_is_done_again(script, tmp_path):
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    for name in ("requirements.txt", "pyproject.toml"):
        (tmp_path / name).touch()
    stub, log = tmp_path / "python", tmp_path / "log"
    stub.write_text(INSTALLING)
    stub.chmod(0o755)

    def run(die):
        log.write_text("")
        places = dict(PYTHON=str(stub), STUB=str(stub), LOG=str(log), DIE=die)
        done = subprocess.run(["bash", str(tmp_path / "launch" / script)], env=os.environ | places, capture_output=True)
        return done.returncode, [line for line in log.read_text().splitlines() if re.search(r"venv|pip install", line)]

    installs = "-m pip install --quiet --disable-pip-version-check --no-compile -r requirements.txt"
    assert run("venv") == (-signal.SIGKILL, ["-m venv .venv"])
    status, calls = run("pip")
    assert status == -signal.SIGKILL and calls[0] == "-m venv .venv" and calls[1].startswith(installs)
    status, calls = run("")
    assert status > 0 and len(calls) == 1 and calls[0].startswith(installs)
    assert (tmp_path / ".venv" / "installed").exists()
    assert run("")[1] == []


def test_stage_3_of_illume_names_the_sources_of_its_records():
    """Every source of the script's records is in the mixture once, and no other."""
    script = (ROOT / "launch" / "illume.sh").read_text()
    found = dict(re.findall(r'^(LARGE|MORE)="(.*)"$', script, re.M))
    line = next(line for line in script.splitlines() if line.startswith("records records_stage3"))
    sources = line.split('"')[1].replace("$MORE", found["MORE"]).replace("$LARGE", found["LARGE"])
    listed = split_sources(sources)
    config = resolve.parse(resolve.load(str(ROOT / "launch" / "illume_stage3.py") + ":laptop-illume"))
    numbers = [source_number(entry["source"], listed) for entry in config.data.mixture]
    assert sorted(number for number in numbers if number is not None) == list(range(len(listed)))
    assert sum(entry["weight"] for entry in config.data.mixture) == pytest.approx(1)
    assert config.data.max_slices == 9 and config.data.seq_len >= 10 * 18
    questions = resolve.parse(resolve.load(str(ROOT / "launch" / "illume_questions.py") + ":laptop-illume"))
    assert {entry["source"] for entry in questions.data.mixture} == {"scenes", found["LARGE"]}
    assert sum(entry["weight"] for entry in questions.data.mixture) == pytest.approx(1)
