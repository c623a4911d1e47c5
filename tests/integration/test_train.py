import errno
import json
import random
import signal
import subprocess
import time
import types

import jax
import numpy as np
import pytest
from helpers import ROOT, STEPS, TEXT_VOCAB, link, main_command, opened, tiny, with_records, write_random_records

from unimm_jax import checkpoint, distributed, metrics
from unimm_jax.compile import hardware
from unimm_jax.data.plan import Plan
from unimm_jax.errors import CheckpointError, DamagedRecordsError, DataError, NonFiniteLossError
from unimm_jax.train import train


def _params(workdir):
    return jax.tree.map(np.asarray, checkpoint.read_params(workdir))


def _equal(a, b):
    a, b = jax.tree.leaves(a), jax.tree.leaves(b)
    return len(a) == len(b) and all(x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("stage", [pytest.param("tokenizer", marks=pytest.mark.slow), "stage3"])
def test_a_killed_run_resumes_to_the_same_bits_twice(run, tmp_path, stage):
    """SIGKILL at an arbitrary step, resumed, killed again, resumed: equal to the uninterrupted run (EMA codebook and
    packed, mixed rows included), and so are the logged means of windows that a checkpoint divides."""
    changes = dict(train__steps=60, train__checkpoint_every=5, train__log_every=4, evals__held_out__every=15)
    link(run, tmp_path, "selector", "records", "stage2")
    whole, broken = tmp_path / f"whole_{stage}", tmp_path / f"broken_{stage}"
    train(tiny(stage, **changes), whole)
    rng = random.Random(stage)
    command = main_command(stage, broken, **changes)
    kills = 0
    for least in (8, 25):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        target = least + rng.randrange(12)
        for line in process.stdout:
            found = line.split("/60")[0].split()
            if line.startswith(stage) and found[-1].isdigit() and int(found[-1]) >= target:
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
        process.wait()
    assert kills == 2
    assert not (broken / "done.json").exists()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "resumes from step" in done.stdout, done.stdout + done.stderr
    assert _equal(_params(whole), _params(broken))
    steps = [row["step"] for row in metrics.read(broken)]
    assert steps == sorted(set(steps)) == list(range(4, 61, 4))
    for file in ("metrics.jsonl", "evals.jsonl"):
        assert [row["loss"] for row in metrics.read(whole, file)] == [row["loss"] for row in metrics.read(broken, file)]
    assert [row["step"] for row in metrics.read(broken, "evals.jsonl")] == [15, 30, 45, 60]


def test_sigterm_saves_at_once_and_exits_with_its_status(run, tmp_path):
    changes = dict(train__steps=100_000, train__checkpoint_every=100_000)
    link(run, tmp_path, "selector")
    workdir = tmp_path / "stopped"
    process = subprocess.Popen(
        main_command("tokenizer", workdir, **changes),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("tokenizer") and " 5/" in line:
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stdout.read()
    assert process.wait() == 143, rest
    assert rest.count("stopped by SIGTERM, saved step") == 1 and "same command again" in rest
    step = checkpoint.find(workdir)
    assert int(step.name) >= 5
    assert f"saved step {step.name}" in rest


def test_each_function_compiles_once(run, tmp_path, caplog):
    """A packed stage with varying token counts: one compilation of the step over the whole run."""
    link(run, tmp_path, "records", "stage2")
    config = tiny("stage3", train__steps=12, train__batch_size=5)
    jax.config.update("jax_log_compiles", True)
    try:
        with caplog.at_level("WARNING", logger="jax"):
            train(config, tmp_path / "stage3")
    finally:
        jax.config.update("jax_log_compiles", False)
    compiled = [r.getMessage() for r in caplog.records if "Compiling" in r.getMessage() and "step_fn" in r.getMessage()]
    assert len(compiled) == 1, compiled


def test_steps_that_need_more_rows_than_surveyed_train_the_same(run, tmp_path, monkeypatch):
    """Padding rows have no loss weight, so the number of rows changes no loss; each new number compiles once more."""
    link(run, tmp_path, "records", "stage2")
    config = tiny("stage3", train__steps=4)
    train(config, tmp_path / "whole")
    survey = Plan._survey

    def too_few(plan, steps):
        survey(plan, steps)
        plan.rows_per_step = 1

    monkeypatch.setattr(Plan, "_survey", too_few)
    train(config, tmp_path / "few")
    losses = [[row["loss"] for row in metrics.read(tmp_path / name)] for name in ("whole", "few")]
    assert len(losses[0]) == 4 and losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_run_says_and_writes_what_it_does(run):
    rows = metrics.read(run / "tokenizer")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert {"loss", "perplexity", "codebook_usage", "kept", "cosine", "learning_rate", "step_ms"} <= rows[-1].keys()
    assert {"keep_rate_sampled", "keep_rate_argmax"} <= metrics.read(run / "selector")[-1].keys()
    assert {"text_ce", "code_ce", "fill", "examples_per_step"} <= metrics.read(run / "stage3")[-1].keys()
    assert (run / "tokenizer" / "images" / "kept_patches.png").exists()
    assert list((run / "tokenizer" / "tensorboard").iterdir())
    done = json.loads((run / "stage3" / "done.json").read_text())
    assert done["steps"] == STEPS
    assert {"prepare", "compile", "evaluation", "checkpoint", "images"} <= done["spent"].keys()
    assert min(done["spent"]["prepare"], done["spent"]["compile"]) > 0.1
    assert sum(done["spent"].values()) <= done["seconds"] + 0.1


def test_frozen_parameters_stay(run):
    before, after = checkpoint.read_params(run / "selector"), checkpoint.read_params(run / "tokenizer")
    for part in ("encoder", "selector"):
        assert _equal(before[part], after[part])
    assert not _equal(before["merger"], after["merger"])
    assert not np.array_equal(before["quantizer"]["codebook"], after["quantizer"]["codebook"])
    assert set(checkpoint.read_params(run / "text")) == {"language"}
    assert _equal(checkpoint.read_params(run / "stage1")["encoder"], after["encoder"])


def test_a_loss_that_is_not_finite_stops_and_names_the_step(run, tmp_path):
    link(run, tmp_path, "encoder")
    config = tiny(
        "selector", optimizer__learning_rate=1e30, optimizer__muon_learning_rate=1e30, optimizer__clip_norm=0.0
    )
    with pytest.raises(NonFiniteLossError, match=r"not finite since step \d+"):
        train(config, tmp_path / "selector")
    assert not (tmp_path / "selector" / "done.json").exists()
    # what was saved before is complete and finite
    for step in (tmp_path / "selector" / "checkpoints").glob("[0-9]*"):
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(_params(step)))


def test_changed_data_is_refused_on_resume(run, tmp_path):
    link(run, tmp_path, "encoder")
    train(tiny("selector"), tmp_path / "selector")
    with pytest.raises(CheckpointError, match="data of .* changed .*records"):
        train(tiny("selector", train__steps=STEPS + 2, data__sources="scenes:count=40"), tmp_path / "selector")


def test_a_finished_run_does_nothing_more(run, tmp_path):
    link(run, tmp_path, "encoder")
    train(tiny("selector"), tmp_path / "selector")
    before = (tmp_path / "selector" / "metrics.jsonl").read_text()
    began = time.time()
    train(tiny("selector"), tmp_path / "selector")
    assert (tmp_path / "selector" / "metrics.jsonl").read_text() == before and time.time() - began < 60
    assert checkpoint.find(tmp_path / "selector").name == str(STEPS)


@pytest.mark.slow
def test_illumes_semantic_variant_trains_with_the_same_code(run, tmp_path):
    """Every patch kept, smooth-L1 + cosine, all features through an MLP adapter."""
    from unimm_jax.inference.pretokenization import pretokenize

    link(run, tmp_path, "encoder")
    fixed = dict(model__image_tokenizer__selection="all", loss__reconstruction="cosine+smooth_l1")
    train(tiny("selector", **fixed), tmp_path / "selector")
    train(tiny("tokenizer", **fixed), tmp_path / "tokenizer")
    pretokenize(str(tmp_path / "tokenizer"), str(tmp_path / "records"), "", "", TEXT_VOCAB, 32)
    settings = dict(
        model__image_tokenizer__selection="all", model__unified__connector="mlp", data__image_targets=0.0,
        optimizer__rules=[("encoder/.*", None), ("adapter.*", 1.0), ("language/.*", 1.0)],
        init_from=(dict(checkpoint="../tokenizer", rename=[("encoder/", "encoder/")]),),
    )  # fmt: skip
    last = train(tiny("stage2", **settings), tmp_path / "stage2")
    assert np.isfinite(last["loss"])
    assert checkpoint.read_meta(tmp_path / "stage2")["data"]["selection"] == "all"


def test_a_run_accounts_for_its_time(run):
    rows = metrics.read(run / "stage3")
    for row in rows:
        assert row["tokens_per_second"] > row["examples_per_second"] > 0 and row["images_per_second"] >= 0
        assert 0 <= row["input_stall"] <= 1 and 0 <= row["goodput"] <= 1 and 0 < row["fill"] <= 1
    assert "compile_seconds" in rows[0] and "mfu" not in rows[0]  # the peak of this chip is not in the table


def test_utilisation_is_the_steps_operations_over_the_peak(run, caplog):
    class Chip:
        device_kind = "TPU v5 lite"

    _, objective = opened(with_records("stage3", run))
    shapes = type(objective).batch_spec(objective.config)
    seconds = hardware.share_of_peak(objective, shapes, [Chip, Chip])
    batch = {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in shapes.items()}
    assert np.isclose(seconds, objective.step_flops(batch) / (2 * 197e12))
    assert hardware.share_of_peak(objective, shapes, jax.devices()) == 0
    assert not caplog.messages
    assert hardware.share_of_peak(objective, shapes, [types.SimpleNamespace(device_kind="X1", platform="gpu")]) == 0
    assert "no MFU is logged: the peak of 'X1'" in caplog.messages[0]


def test_clocks_count_what_they_say(tmp_path):
    clock = metrics.Clock()
    with clock.on("input", counts=lambda: False):
        time.sleep(0.05)
    assert clock.read()["input_stall"] == 0 and "input" not in clock.whole
    with clock.on("input"):
        time.sleep(0.05)
    assert clock.read()["input_stall"] > 0.5 and clock.read()["input_stall"] == 0
    writer = metrics.Writer(tmp_path, "x", 10, 0)
    writer.count_from(2)
    time.sleep(0.04)
    with writer.paused():
        time.sleep(0.4)
    found = writer.scalars(6, {"loss": 1.0}, {"examples": 2.0})
    assert 10 <= found["step_ms"] < 60 and found["examples_per_second"] == pytest.approx(2e3 / found["step_ms"])
    writer.close()


def test_lines_after_the_checkpoint_are_cut_off_without_writing(tmp_path, monkeypatch):
    """On a full disk, or if the process is killed at this moment, no earlier line is lost."""
    file = tmp_path / "metrics.jsonl"
    lines = "".join(json.dumps({"step": step, "loss": 1.5}) + "\n" for step in range(1, 6))
    file.write_text(lines + '{"step": 6, "lo')
    monkeypatch.setattr(type(file), "write_text", None)
    for step, kept in ((9, 5), (3, 3), (3, 3)):
        metrics.Writer(tmp_path, "x", 10, step).close()
        assert [row["step"] for row in metrics.read(tmp_path)] == list(range(1, kept + 1))
    file.write_bytes(lines[:-1].encode())  # the last line lacks its end
    metrics.Writer(tmp_path, "x", 10, 9).close()
    assert file.read_text() == "".join(lines.splitlines(keepends=True)[:4])


def test_events_are_written_and_a_full_disk_is_an_error(tmp_path, monkeypatch):
    from tensorboardX import record_writer
    from tensorboardX.proto.event_pb2 import Event

    writer = metrics.Writer(tmp_path, "x", 10, 0)
    writer.scalars(3, {"loss": 1.5}, {"examples": 2.0})
    writer.image(3, "drawn", np.zeros((4, 4, 3), np.uint8))
    (file,) = (tmp_path / "tensorboard").iterdir()
    data, events = file.read_bytes(), []  # written at once, without close
    while data:
        length = int.from_bytes(data[:8], "little")
        events.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    values = {value.tag: value for event in events for value in event.summary.value if event.step == 3}
    assert values["loss"].simple_value == 1.5 and values["drawn"].image.width == 4
    writer.close()

    class Full:
        """A file on a full disk."""

        def write(self, data):
            pass

        def flush(self):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(record_writer, "open_file", lambda path: Full())
    (tmp_path / "full").mkdir()
    writer = metrics.Writer(tmp_path / "full", "x", 10, 0)
    with pytest.raises(OSError, match="No space left"):
        for step in range(20):
            writer.scalars(step, {"loss": 1.5}, {"examples": 2.0})


def test_own_data_that_changed_under_the_same_names_is_refused(tmp_path):
    from PIL import Image

    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(12):
        Image.new("RGB", (64, 64), (20 * i, 10, 10)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"image number {i}")
    config = tiny("encoder", data__sources=str(folder), train__steps=2, evals={})
    train(config, tmp_path / "encoder")
    (folder / "3.txt").write_text("image number 4")
    with pytest.raises(CheckpointError, match=r"changed since step 2 .*fingerprints"):
        train(config, tmp_path / "encoder")
    (folder / "3.txt").write_text("image number 3")
    train(config, tmp_path / "encoder")


def test_a_run_of_one_step_has_a_held_out_loss_of_several_batches(run, tmp_path):
    link(run, tmp_path, "records", "stage1")
    train(tiny("stage2", train__steps=1, evals__held_out__batches=4), tmp_path / "stage2")
    assert [row["step"] for row in metrics.read(tmp_path / "stage2", "evals.jsonl")] == [1]


def test_an_evaluation_that_fails_does_not_end_the_run(run, tmp_path, monkeypatch, caplog):
    from unimm_jax.evals.heldout_loss import HeldOutLoss

    def fail(self, context):
        raise RuntimeError("out of memory")

    link(run, tmp_path, "encoder")
    monkeypatch.setattr(HeldOutLoss, "run", fail)
    train(tiny("selector"), tmp_path / "selector")
    assert "the evaluation held_out failed; training continues" in caplog.text and "out of memory" in caplog.text
    assert json.loads((tmp_path / "selector" / "done.json").read_text())["steps"] == STEPS


@pytest.mark.parametrize(
    "error",
    [
        DataError("a block is missing"),
        pytest.param(OSError(errno.ENOSPC, "No space left on device"), marks=pytest.mark.slow),
    ],
)
def test_an_evaluation_that_lacks_a_file_or_space_stops_the_run_and_is_made_up(run, tmp_path, monkeypatch, error):
    from unimm_jax.evals.heldout_loss import HeldOutLoss

    whole, calls = HeldOutLoss.run, []

    def fail_once(self, context):
        calls.append(context.step)
        if len(calls) == 2:
            raise error
        return whole(self, context)

    link(run, tmp_path, "encoder")
    monkeypatch.setattr(HeldOutLoss, "run", fail_once)
    config = tiny("selector", train__steps=16, evals__held_out__every=4)
    with pytest.raises(type(error)):
        train(config, tmp_path / "selector")
    assert checkpoint.find(tmp_path / "selector").name == "8"
    train(config, tmp_path / "selector")
    assert calls == [4, 8, 8, 12, 16]
    assert [row["step"] for row in metrics.read(tmp_path / "selector", "evals.jsonl")] == [4, 8, 12, 16]


@pytest.mark.parametrize("name", ["header.json", "index/sizes_ends.npy", "blocks/000000.array_record"])
def test_a_missing_held_out_file_stops_the_run_and_a_missing_split_does_not(tmp_path, capfd, monkeypatch, name):
    records = tmp_path / "records"
    write_random_records(records, 48)
    write_random_records(records / "test", 16)
    changes = dict(data__records=str(records), train__steps=2, init_from=())
    file, away = records / "test" / name, tmp_path / "away"
    file.rename(away)
    with pytest.raises(DamagedRecordsError, match=file.name):
        train(tiny("text", **changes), tmp_path / "text")
    away.rename(file)
    train(tiny("text", **changes), tmp_path / "text")
    assert [row["step"] for row in metrics.read(tmp_path / "text", "evals.jsonl")] == [2]
    (records / "test").rename(away)
    train(tiny("text", **changes), tmp_path / "without")
    assert "no held-out loss" in capfd.readouterr().out and (tmp_path / "without" / "done.json").exists()
    # of several processes, all or none have the split
    monkeypatch.setattr(distributed, "gather", lambda data: [b"yes", data] if data == b"no" else [data])
    with pytest.raises(DataError, match=r"missing on processes \[1\] only"):
        train(tiny("text", **changes), tmp_path / "one_without")
    assert checkpoint.find(tmp_path / "one_without").name == "2"  # no step is lost


def test_an_evaluation_that_a_stop_skipped_is_made_up_on_resume(run, tmp_path):
    link(run, tmp_path, "encoder")
    workdir = tmp_path / "selector"
    train(tiny("selector", evals__held_out__every=10), workdir)
    rows = metrics.read(workdir, "evals.jsonl")
    assert [row["step"] for row in rows] == [10, 20, 30]
    for step in (30, 20):
        (workdir / "checkpoints" / str(step)).rename(tmp_path / f"away{step}")
    (workdir / "evals.jsonl").write_text("")  # as if stopped right after the step that is evaluated
    (tmp_path / "away20").rename(workdir / "checkpoints" / "20")
    train(tiny("selector", evals__held_out__every=10), workdir)
    assert metrics.read(workdir, "evals.jsonl") == rows[1:]
