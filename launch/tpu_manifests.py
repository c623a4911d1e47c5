"""A run for other launchers: an xpk command, a JobSet for GKE, a SkyPilot task; from the settings of launch/tpu.py."""

import json
import shlex
from typing import Any

RESTARTS = 100  # after preemption
GRACE_SECONDS = 300  # from SIGTERM to SIGKILL, to save
LOST_PROCESS, KILLED = 75, 137
# Exit statuses after which a command starts again; JAX aborts a process that has lost another one
RECOVERED = {143: "was stopped by SIGTERM", KILLED: "was killed", 134: "was aborted", LOST_PROCESS: "lost another host"}


def problem(settings: Any, target: str) -> str:
    """What a launcher cannot do of the settings, in one line; empty if nothing."""
    if target == "skypilot" and settings.slices > 1:
        return "SkyPilot does not connect several slices; give --slices=1, or --target=jobset or xpk"
    if settings.provisioning not in ("on-demand", "spot") or (settings.provisioning == "spot" and target == "xpk"):
        other = "on-demand or spot" if target == "skypilot" else "on-demand, for a node pool that is made with it"
        return f"--provisioning={settings.provisioning} cannot be rendered for {target}; give {other}"
    return ""


def xpk(settings: Any, image: str, cluster: str) -> str:
    """The xpk command. xpk also starts again after the statuses 42 and 127 to 255, so after all of `RECOVERED`."""
    words = ["xpk", "workload", "create", f"--workload={settings.name}", f"--cluster={cluster or 'CLUSTER'}"]
    words += [f"--docker-image={image or 'IMAGE'}", f"--tpu-type={settings.kind.name}"]
    words += [f"--num-slices={settings.slices}", f"--max-restarts={RESTARTS}"]
    words += [f"--restart-on-exit-codes={LOST_PROCESS}", f"--termination-grace-period-seconds={GRACE_SECONDS}"]
    words += [f"--zone={settings.zone}"] if settings.zone else []
    words += [f"--project={settings.project}"] if settings.project else []
    return shlex.join([*words, f"--command={_shell(settings)}"]) + "\n"


def jobset(settings: Any, image: str, cluster: str) -> str:
    """The JobSet: a job for each slice, a pod for each host. JSON is YAML."""
    kind = settings.kind
    selector = {"cloud.google.com/gke-tpu-accelerator": kind.gke, "cloud.google.com/gke-tpu-topology": kind.topology}
    if settings.provisioning == "spot":
        selector["cloud.google.com/gke-spot"] = "true"
    chips = {"google.com/tpu": kind.chips_per_host}
    container = {
        "name": "unimm-jax",
        "image": image or "IMAGE",
        "command": ["bash", "-c", _shell(settings)],
        "ports": [{"containerPort": 8471}, {"containerPort": 8080}],
        "resources": {"requests": chips, "limits": chips},
    }
    pod = {"restartPolicy": "Never", "nodeSelector": selector, "containers": [container]}
    pod |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet", "terminationGracePeriodSeconds": GRACE_SECONDS}
    job: dict[str, Any] = {
        "parallelism": kind.hosts,
        "completions": kind.hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "template": {"spec": pod},
    }
    # another status is an error of the command, which a restart does not mend
    codes = {"containerName": container["name"], "operator": "NotIn", "values": sorted(RECOVERED)}
    job["podFailurePolicy"] = {"rules": [{"action": "FailJob", "onExitCodes": codes}]}
    stop = {"name": "error", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    topology = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    found = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": settings.name, "annotations": topology},
        "spec": {
            "failurePolicy": {"maxRestarts": RESTARTS, "rules": [stop]},
            "replicatedJobs": [{"name": "slice", "replicas": settings.slices, "template": {"spec": job}}],
        },
    }
    return json.dumps(found, indent=2) + "\n"


def skypilot(settings: Any, image: str, cluster: str) -> str:
    """The SkyPilot task, for `sky jobs launch`. JSON is YAML.

    SkyPilot reports the status `KILLED` of every host that it stops after an error on another one, so this status must
    not start the task again. It recovers from preemptions by itself.
    """
    region = settings.zone.rpartition("-")[0]
    resources: dict[str, Any] = {
        "infra": "/".join(["gcp", *([region, settings.zone] if region else [])]),
        "accelerators": f"tpu-{settings.kind.name}",
        "accelerator_args": {"runtime_version": settings.runtime},
        "use_spot": settings.provisioning == "spot",
        "job_recovery": {"recover_on_exit_codes": [code for code in RECOVERED if code != KILLED]},
    }
    install = (
        "python3 -m pip install --quiet --user uv && python3 -m uv venv --quiet --allow-existing --python 3.12 venv"
    )
    found = {
        "name": settings.name,
        "workdir": ".",
        "num_nodes": settings.slices,
        "resources": resources,
        "envs": dict(entry.partition("=")[::2] for entry in settings.env),
        "setup": f"{install} && python3 -m uv pip install --quiet --python venv/bin/python '.[tpu,gcs]'",
        "run": f'PATH="$PWD/venv/bin:$PATH" && {shlex.join(settings.command)}',
    }
    return json.dumps(found, indent=2) + "\n"


def _shell(settings: Any) -> str:
    """The command with its variables, for a shell. It takes the place of the shell, and so gets SIGTERM."""
    exports = [f"export {name}={shlex.quote(value)}" for name, _, value in (e.partition("=") for e in settings.env)]
    return " && ".join([*exports, f"exec {shlex.join(settings.command)}"])


TARGETS = {"xpk": xpk, "jobset": jobset, "skypilot": skypilot}
