"""The fault campaign and the soak: what they plan and how they judge. The runs themselves are in a slow test."""

import copy

import numpy as np
import object_store
import pytest

from benchmarks import soak
from benchmarks.faults import campaign, judge, plan

LEFT = {
    "state": {"['params']['w']": judge.digest(np.arange(4, dtype=np.float32)), "['step']": judge.digest(np.int32(40))},
    "metrics": [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.25}],
    "done": 40,
    "files": ["checkpoints", "metrics.jsonl"],
}
REFUSED = "WARNING x: y\nerror: /disk/run: No space left on device; free some space\n"


def test_a_seed_gives_one_plan():
    points = plan.draw_all(0, 70, (1, 2, 4))
    assert points == plan.draw_all(0, 70, (1, 2, 4)) and points[:8] == plan.draw_all(0, 8, (1, 2, 4))
    assert points != plan.draw_all(1, 70, (1, 2, 4))
    assert {p.processes for p in plan.draw_all(0, 70, (1, 2))} == {1, 2}
    for first in range(0, 70, len(plan.KINDS)):
        assert {p.kind for p in points[first : first + len(plan.KINDS)]} == set(plan.KINDS)
    assert {p.phase for p in points} == set(plan.PHASES) and {p.processes for p in points} == {1, 2, 4}
    assert all(-1 <= p.target < p.processes and 1 <= p.step < plan.STEPS for p in points)
    assert all(
        p.place == ("disk" if p.kind == "full disk" else "store") for p in points if p.kind[:3] in ("ful", "sto")
    )


def test_a_run_has_points_of_one_place_and_number_of_processes():
    points = plan.draw_all(3, 50, (1, 2, 4))
    groups = plan.in_runs(points)
    assert sorted(p.number for group in groups for p in group) == list(range(50))
    assert all(len({(p.place, p.processes) for p in group}) == 1 for group in groups)
    assert max(map(len, groups)) == plan.PER_RUN


@pytest.mark.parametrize(
    "status, said, sent, wanted",
    [
        (0, "text:laptop  40/40  loss 3", (), "finished"),
        (-9, "", (9,), "killed"),
        (-15, "", (15,), "killed"),
        (143, "text:laptop: stopped by SIGTERM, saved step 7; run the same command again to resume", (15,), "stopped"),
        (1, REFUSED, (), "refused: /disk/run: No space left on device; free some space"),
        (-6, f"Terminating process because the {judge.JAX_ABORT}. This most likely", (), "aborted by JAX"),
        (-9, "", (), "failure: status -9: "),
        (1, "no such thing", (), "failure: status 1: no such thing"),
        (143, "nothing saved", (15,), "failure: status 143: nothing saved"),
        (0, f"{judge.TRACEBACK}:\n  File x\nOSError: full\n", (), "failure: traceback, status 0: OSError: full"),
    ],
)
def test_how_a_process_ended(status, said, sent, wanted):
    assert judge.verdict(status, said, sent) == wanted


def test_which_ends_a_fault_excuses():
    full = "refused: /disk/run: No space left on device; free some space"
    lost = "refused: another process of this run has ended or cannot be reached (UNAVAILABLE)"
    assert judge.unexpected([full, "stopped"], ["full disk"], 1) == []
    assert judge.unexpected(["refused: x", lost, full], ["SIGKILL"], 1) == ["refused: x", lost, full]
    assert judge.unexpected([lost, "aborted by JAX", "killed"], ["SIGKILL"], 2) == []
    assert judge.unexpected([full], ["full disk", "SIGKILL"], 1) == []
    assert judge.unexpected(["refused: x", lost, full], ["store down"], 2) == ["refused: x", full]
    assert judge.unexpected(["aborted by JAX"], ["store down"], 1) == ["aborted by JAX"]
    assert judge.unexpected(["failure: status -11: "], ["store down"], 2)


def test_a_changed_byte_is_a_difference():
    assert judge.differences(LEFT, copy.deepcopy(LEFT)) == []
    changed = np.arange(4, dtype=np.float32)
    changed.view(np.uint8)[0] ^= 1
    found = copy.deepcopy(LEFT)
    found["state"]["['params']['w']"] = judge.digest(changed)
    assert judge.differences(LEFT, found) == ["state: 1 entries differ, among them ['params']['w']"]
    for part, value in (("metrics", LEFT["metrics"][:1]), ("done", 39), ("files", [*LEFT["files"], ".probe-1"])):
        assert len(judge.differences(LEFT, LEFT | {part: value})) == 1


def test_times_are_left_out_and_nothing_else():
    row = {"step": 1, "loss": 2.5, "learning_rate": 0.1, "fill": 0.9}
    times = {"step_ms": 3.0, "tokens_per_second": 5.0, "goodput": 0.4, "compile_seconds": 1.0, "input_stall": 0.0}
    assert judge.untimed(row | times) == row


def test_the_table_counts_every_point_once():
    rows = [
        dict(kind="SIGKILL", processes=2, phase="train", result="equal", refused=True, aborted=False),
        dict(kind="SIGKILL", processes=2, phase="end", result="equal", refused=False, aborted=False),
        dict(kind="SIGKILL", processes=1, phase="end", result="failure", refused=False, aborted=False),
        dict(kind="full disk", processes=1, phase="end", result="skipped"),
    ]
    assert campaign.counts(rows) == [4, 2, 1, 0, 1, 1]
    assert "| SIGKILL | 2 | 2 | 2 | 1 | 0 | 0 | 0 |" in campaign.summary(rows)


def test_the_store_continues_with_confirmed_changes(tmp_path):
    first = object_store.Store()
    first.open_journal(tmp_path / "journal")
    first.put("b", "x", b"one", None)
    first.put("b", "y", b"two", None)
    first.change("objects", ("b", "x"), None)
    whole = (tmp_path / "journal").read_bytes()
    first.put("b", "z", b"three", None)
    cut = (tmp_path / "journal").read_bytes()[:-3]  # killed while it wrote
    assert len(cut) > len(whole)
    (tmp_path / "journal").write_bytes(cut)
    second = object_store.Store()
    second.open_journal(tmp_path / "journal")
    assert second.objects == {("b", "y"): (2, b"two")} and (tmp_path / "journal").read_bytes() == whole
    second.put("b", "z", b"four", None)
    third = object_store.Store()
    third.open_journal(tmp_path / "journal")
    assert third.objects[("b", "z")] == (3, b"four")


def test_growth_is_told_from_noise():
    hours, rng = np.linspace(0, 2, 1000), np.random.default_rng(0)
    flat = 500 + rng.normal(0, 3, 1000)
    warm_up = 200 * (1 - np.exp(-10 * hours))
    assert soak.growth(hours, flat + warm_up).verdict(16) == "no growth"
    leak = soak.growth(hours, flat + warm_up + 40 * hours)
    assert leak.verdict(16) == soak.GROWS and abs(leak.per_hour - 40) < 4 * leak.error < 10
    assert soak.growth(hours / 100, flat + 40 * hours / 100).verdict(16).startswith("not decided")


def test_a_sample_counts_this_process(tmp_path):
    before = soak.sample(soak.os.getpid())
    files = [open(tmp_path / str(i), "w") for i in range(5)]
    after = soak.sample(soak.os.getpid())
    for file in files:
        file.close()
    assert after["files"] - before["files"] == 5 and after["memory"] > 10 and after["threads"] >= 1
