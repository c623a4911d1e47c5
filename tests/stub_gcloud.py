"""A stand-in for gcloud: TPU requests that walk through their states, and hosts that are directories of this machine.

STUB is its directory: `request.json` (state, type and node names), `fail_create` (what create says instead),
`fail_request` (why every request fails), `fail_once` (a JSON list of [action, what it says instead, and perhaps a new
`request.json`], each used once), `offline` (every call fails as without a network), `hosts/NODE-I` (home of a host),
`unreachable` (hosts without ssh), `repeat` (seconds after which the connection to a log breaks once; gcloud then
repeats the command), `log` (every call), `workers` (hosts of a node).
"""

import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import sys

STUB = pathlib.Path(os.environ["STUB"])
REQUEST = STUB / "request.json"
CREATE = {  # flags of `queued-resources create` by release track, of those that the launcher could use
    "": {"accelerator-type", "runtime-version", "node-id", "node-count", "node-prefix", "spot", "reserved",
         "valid-until-duration", "zone", "project", "quiet"},
    "alpha": {"provisioning-model", "max-run-duration"},
}  # fmt: skip
CREATE["alpha"] |= CREATE[""]
NEXT = {"WAITING_FOR_RESOURCES": "PROVISIONING", "PROVISIONING": "ACTIVE", "SUSPENDING": "SUSPENDED"}


def refuse(text):
    print(text, file=sys.stderr)
    sys.exit(1)


def option(words, name, default=""):
    return next((w.partition("=")[2] for w in words if w.startswith(f"--{name}=")), default)


def home(node, worker):
    return STUB / "hosts" / f"{node}-{worker}"


def fail_once(action):
    file = STUB / "fail_once"
    waiting = json.loads(file.read_text()) if file.exists() else []
    if said := next((entry for entry in waiting if entry[0] == action), None):
        waiting.remove(said)
        file.write_text(json.dumps(waiting))
        if said[2:]:  # it failed, but the request was made
            REQUEST.write_text(said[2])
        refuse(said[1])


def requests(words, track):
    action, name = words[0], words[1]
    fail_once(action)
    if action == "create":
        given = {word.lstrip("-").partition("=")[0] for word in words[2:]}
        if unknown := given - CREATE[track]:
            refuse(f"ERROR: (gcloud.compute.tpus.queued-resources.create) unrecognized arguments: {sorted(unknown)}")
        if (STUB / "fail_create").exists():
            refuse((STUB / "fail_create").read_text())
        if REQUEST.exists():
            refuse(f"ERROR: (gcloud.compute.tpus.queued-resources.create) ALREADY_EXISTS: {name} already exists")
        count, prefix = option(words, "node-count"), option(words, "node-prefix")
        nodes = [f"{prefix}-{i}" for i in range(int(count))] if count else [option(words, "node-id")]
        state = "FAILED" if (STUB / "fail_request").exists() else "WAITING_FOR_RESOURCES"
        REQUEST.write_text(json.dumps({"state": state, "nodes": nodes, "type": option(words, "accelerator-type")}))
        return
    if not REQUEST.exists():
        refuse(f"ERROR: (gcloud.compute.tpus.queued-resources.{action}) NOT_FOUND: Resource {name} was not found")
    found = json.loads(REQUEST.read_text())
    if action == "delete":
        if found["state"] == "SUSPENDING":
            refuse("ERROR: (gcloud.compute.tpus.queued-resources.delete) FAILED_PRECONDITION: it is SUSPENDING")
        REQUEST.unlink()
        return
    state = {"state": found["state"]}
    if (STUB / "fail_request").exists():
        state["failedData"] = {"error": {"code": 8, "message": (STUB / "fail_request").read_text()}}
    spec = {"node": {"acceleratorType": found["type"]}}
    several = len(found["nodes"]) > 1
    spec |= {"multisliceParams": {"nodeCount": len(found["nodes"])}} if several else {"nodeId": found["nodes"][0]}
    print(json.dumps({"state": state, "tpu": {"nodeSpec": [spec]}}))
    if found["state"] in NEXT:
        found["state"] = NEXT[found["state"]]
        if found["state"] == "ACTIVE":  # new machines with empty disks
            shutil.rmtree(STUB / "hosts", ignore_errors=True)
            for node in found["nodes"]:
                for worker in range(int((STUB / "workers").read_text())):
                    home(node, worker).mkdir(parents=True)
        REQUEST.write_text(json.dumps(found))


def hosts_of(node, words):
    which = option(words, "worker")
    return range(int((STUB / "workers").read_text())) if which == "all" else [int(which)]


def ssh(words):
    node, command, bad = words[0], option(words, "command"), 0
    unreachable = (STUB / "unreachable").read_text().split() if (STUB / "unreachable").exists() else []
    for worker in hosts_of(node, words):
        place = home(node, worker)
        if str(worker) in unreachable or not place.exists():
            print(
                "ERROR: (gcloud.compute.tpus.tpu-vm.ssh) [/usr/bin/ssh] exited with return code [255].", file=sys.stderr
            )
            bad = 255
            continue
        env = os.environ | {"HOME": str(place), "JAX_PROCESS_ID": str(worker)}
        (place / "hostname").write_text(f"#!/bin/sh\necho {node}-w-{worker}\n")
        (place / "hostname").chmod(0o755)
        env["PATH"] = f"{place}:{env['PATH']}"
        if " -F " in command and (STUB / "repeat").exists():
            seconds = float((STUB / "repeat").read_text())
            (STUB / "repeat").unlink()
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run(["bash", "-c", command], env=env, cwd=place, timeout=seconds)
        bad = subprocess.run(["bash", "-c", command], env=env, cwd=place).returncode or bad
    sys.exit(bad)


def scp(words):
    source, target = words[0], words[1]
    node, _, name = target.partition(":")
    for worker in hosts_of(node, words):
        shutil.copy(source, home(node, worker) / name)


def main(words):
    with (STUB / "log").open("a") as log:
        log.write(json.dumps(words) + "\n")
    if (STUB / "offline").exists():
        refuse(
            "ERROR: (gcloud) There was a problem refreshing your current auth tokens: HTTPSConnectionPool: timed out"
        )
    if "--zone=us-nowhere1-z" in words:
        refuse(
            "ERROR: (gcloud) PERMISSION_DENIED: Permission denied on 'locations/us-nowhere1-z' (or it may not exist)."
        )
    track = words.pop(0) if words[0] == "alpha" else ""
    group, rest = words[2], words[3:]
    if group == "queued-resources":
        requests(rest, track)
    elif rest[0] == "ssh":
        ssh(rest[1:])
    else:
        scp(rest[1:])


main(sys.argv[1:])
