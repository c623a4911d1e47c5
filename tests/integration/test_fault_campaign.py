"""The fault campaign with a few points."""

import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_four_faults_change_nothing(tmp_path):
    """pytest -m slow tests/integration/test_fault_campaign.py: a few minutes on two idle cores."""
    line = [sys.executable, "-m", "benchmarks.faults", "--points=4", f"--output={tmp_path}", "--processes", "1", "2"]
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env=env)
    rows = [json.loads(text) for text in (tmp_path / "points.jsonl").read_text().splitlines()]
    status = int(any(row["result"] == "skipped" for row in rows))  # without the right to mount a disk
    assert done.returncode == status, done.stdout[-3000:] + done.stderr[-3000:]
    assert sorted(row["number"] for row in rows) == [0, 1, 2, 3]
    assert {row["result"] for row in rows} <= {"equal", "skipped"} and "| all |" in (
        tmp_path / "results.md"
    ).read_text()
    again = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env=env)
    assert again.returncode == status and len((tmp_path / "points.jsonl").read_text().splitlines()) == 4
