"""What launch/tpu.py renders for other launchers."""

import json
import shlex
import subprocess
import sys

import pytest
from helpers import ROOT

from launch.tpu_types import FAMILIES, tpu_type

COMMAND = ("python", "-m", "unimm_jax.main", "--workdir=gs://b/with space")


def render(target, *flags):
    words = [sys.executable, str(ROOT / "launch" / "tpu.py"), "render", "run", f"--target={target}", *flags]
    return subprocess.run([*words, "--", *COMMAND], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    "name, chips, hosts, topology",
    [
        ("v5litepod-1", 1, 1, "1x1"),
        ("v5e-8", 8, 1, "2x4"),
        ("v5litepod-256", 256, 64, "16x16"),
        ("v6e-16", 16, 4, "4x4"),
        ("v5p-8", 4, 1, "2x2x1"),
        ("v4-128", 64, 16, "4x4x4"),
    ],
)
def test_types(name, chips, hosts, topology):
    kind = tpu_type(name)
    assert (kind.chips, kind.hosts, kind.topology) == (chips, hosts, topology)
    assert kind.runtime == FAMILIES[kind.name.partition("-")[0]][2]


@pytest.mark.parametrize("name", ["v5litepod-7", "v5p-7", "v9-8", "v5litepod", ""])
def test_unknown_types_are_refused(name):
    with pytest.raises(ValueError, match="types are"):
        tpu_type(name)


def test_a_jobset_has_a_job_per_slice_and_a_pod_per_host():
    flags = ("--type=v5litepod-16", "--slices=2", "--provisioning=spot", "--image=i:1", "--env=A=b c")
    found = json.loads(render("jobset", *flags))
    assert (found["apiVersion"], found["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = found["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert job["replicas"] == 2 and spec["parallelism"] == spec["completions"] == 4 and spec["backoffLimit"] == 0
    pod = spec["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4} and container["image"] == "i:1"
    assert container["command"] == ["bash", "-c", f"export A='b c' && exec {shlex.join(COMMAND)}"]


def test_an_xpk_command_has_the_command_as_one_word():
    words = shlex.split(render("xpk", "--type=v6e-16", "--slices=3", "--cluster=c", "--image=i:1", "--zone=us-east5-a"))
    assert words[:3] == ["xpk", "workload", "create"]
    assert {"--cluster=c", "--tpu-type=v6e-16", "--num-slices=3", "--zone=us-east5-a", "--docker-image=i:1"} < {*words}
    assert "--restart-on-exit-codes=75" in words  # the others are xpk's defaults
    assert words[-1] == f"--command=exec {shlex.join(COMMAND)}"


def test_a_skypilot_task_runs_the_command_in_its_environment():
    flags = ("--type=v5litepod-16", "--provisioning=spot", "--zone=us-west4-a", "--env=A=b c")
    found = json.loads(render("skypilot", *flags))
    assert found["resources"] == {
        "infra": "gcp/us-west4/us-west4-a",
        "accelerators": "tpu-v5litepod-16",
        "accelerator_args": {"runtime_version": "v2-alpha-tpuv5-lite"},
        "use_spot": True,
        "job_recovery": {"recover_on_exit_codes": [143, 134, 75]},  # 137 also follows an error of another host
    }
    assert found["envs"] == {"A": "b c"} and found["run"].endswith(shlex.join(COMMAND))
