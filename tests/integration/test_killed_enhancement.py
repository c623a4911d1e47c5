"""Self-enhancement that is killed at random moments and started again gives what an undisturbed run gives."""

import os
import random
import subprocess
import sys
import time

import pytest
from helpers import ROOT

KILLS = 8
SECONDS = 4.0  # of an undisturbed run after its start: every image takes a while
PROGRAM = """
import sys, time
sys.path.insert(0, "tests")
from helpers import write_drawings
from unimm_jax.enhancement import building, drawings
from unimm_jax.enhancement.assessing import assess

folder, pause = sys.argv[1], float(sys.argv[2])

def slow(function):
    def slower(*arguments):
        time.sleep(pause)
        return function(*arguments)
    return slower

drawings.BLOCK = 4
drawings.transforms.encode_png = slow(drawings.transforms.encode_png)
for name in ("encoded", "image"):
    setattr(drawings.Drawings, name, slow(getattr(drawings.Drawings, name)))
print("ready", flush=True)
drawn, stored = write_drawings(drawings.storage.path(folder) / "drawings", 40)
building.Records.open = classmethod(lambda cls, path: stored)
assess(str(drawn.path), "scenes")
building.build(str(drawn.path), "records", folder + "/built")
"""


def run(folder, pause, kill_after=None):
    words = [sys.executable, "-c", PROGRAM, str(folder), str(pause)]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(
        words, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        next(line for line in process.stdout if "ready" in line)
        if kill_after is not None:
            time.sleep(kill_after)
            process.kill()
        said = process.stdout.read()
    return process.returncode, said


def contents(folder):
    files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    return {name: sorted(data.splitlines()) if "verdicts-" in name else data for name, data in files.items()}


@pytest.mark.slow
def test_commands_that_are_killed_are_resumed(tmp_path):
    """pytest -m slow tests/integration/test_killed_enhancement.py"""
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    assert run(tmp_path / "whole", 0.0)[0] == 0
    rng, stopped = random.Random(0), []
    for at in range(KILLS):
        after = rng.uniform(at, at + 1) * SECONDS / KILLS
        status, said = run(tmp_path / "killed", 0.02, after)
        assert status in (0, -9), said
        stopped.append((status, sorted(path.name for path in (tmp_path / "killed").glob("[a-z]*"))))
    assert sum(status == -9 for status, _ in stopped) > KILLS / 2, stopped
    status, said = run(tmp_path / "killed", 0.0)
    assert status == 0, said
    for part in ("drawings", "built"):
        assert contents(tmp_path / "killed" / part) == contents(tmp_path / "whole" / part)
    print(stopped)
