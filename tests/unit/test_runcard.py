"""Digests of batches and how they name records; what a comparison of run cards says."""

import copy
import json
import re
import shutil

import numpy as np
import pytest
from helpers import ROOT, STEPS, opened, tiny, with_records

from unimm_jax import reproduction, runcard, storage
from unimm_jax.data import digests
from unimm_jax.errors import DataError


def step_of(data, index, metrics=None, **changed):
    batch = data.batch(index) | changed
    values = {"loss": 2.5, "grad_norm": 1.0} | (metrics or {})
    record = {"step": index + 1, "metrics": {name: value.hex() for name, value in values.items()}}
    return record | digests.of_batch(digests.of_rows(data, batch))


def test_a_run_card_names_every_requirement():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    names = {re.match(r"[\w-]+", line)[0] for line in lines if not line.startswith("#")}
    assert (
        len(names) > 20 and names <= set(runcard.PACKAGES) and set(storage.PACKAGES.values()) <= set(runcard.PACKAGES)
    )


def test_shares_of_rows_have_the_digests_of_the_whole_batch(run):
    for stage in ("stage3", "selector", "pixel_decoder"):
        data, _ = opened(with_records(stage, run))
        whole = digests.of_rows(data, data.batch(1, multiple=4))
        parts = [digests.of_rows(data, data.batch(1, lambda n, i=i: np.arange(n)[i::2], 4)) for i in range(2)]
        mixed = [row for pair in zip(*parts, strict=True) for row in pair]
        assert digests.of_batch(mixed) == digests.of_batch(whole)
        assert digests.of_batch(whole) != digests.of_batch(whole[::-1])
        assert digests.of_batch(whole) == digests.of_batch(digests.of_rows(data, data.batch(1)))  # without padding


def test_every_packed_example_has_a_digest_and_one_pixel_changes_one(run):
    data, _ = opened(with_records("stage3", run))
    plan, batch = data.rows.plan, data.batch(2)
    rows = digests.examples_of(step_of(data, 2)["examples"])
    assert [len(row) for row in rows] == [len(row) for row in plan.rows(2)]
    row = next(i for i in range(len(rows)) if batch["feature_index"][i].max() >= 0)
    images = batch["images"].copy()
    images[row, 0, 5, 5, 0] ^= 1
    found = reproduction.batch_differences([step_of(data, 2, images=images)], [step_of(data, 2)], lambda: data)
    reads = next(
        i for i in range(len(rows[row])) if (batch["feature_index"][row][batch["segments"][row] == i + 1] >= 0).any()
    )
    record = plan.rows(2)[row][reads].record
    assert len(found) == 1
    start = f"step 3: example {reads + 1} of row {row + 1} of {len(rows)} differs (images): record {record} "
    assert found[0].startswith(start + "of scenes:count=96 ") and data.records[record].key in found[0]


def test_a_changed_block_of_records_names_the_record(run, tmp_path):
    """One pixel of one image in the block on disk; header, index and plan stay the same."""
    import io

    import msgpack
    from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
    from PIL import Image

    shutil.copytree(run / "records", tmp_path / "records")
    config = with_records("pixel_decoder", run)
    data, _ = opened(config)
    chosen = data.records.image_place(data.rows.place(5)[1])[0]  # the sixth image of the first batch
    block = tmp_path / "records" / "blocks" / "000000.array_record"
    items = [msgpack.unpackb(item) for item in ArrayRecordReader(str(block)).read_all()]
    image = np.array(Image.open(io.BytesIO(items[chosen]["images"][0])))
    image[3, 4, 1] ^= 1
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    items[chosen]["images"][0] = buffer.getvalue()
    writer = ArrayRecordWriter(str(block), "group_size:1")
    for item in items:
        writer.write(msgpack.packb(item))
    writer.close()
    changed, _ = opened(with_records("pixel_decoder", tmp_path))
    now, was = ([step_of(each, i) for i in range(3)] for each in (changed, data))
    found = reproduction.batch_differences(now, was, lambda: changed)
    first = f"step 1: image 6 of 8 differs (images): record {chosen} of scenes:count=96 "
    assert found[0].startswith(first) and all(f"record {chosen} " in line for line in found)


def test_many_examples_are_counted(run):
    data, _ = opened(tiny("selector"))
    noise = np.zeros((8, 64, 64, 3), np.uint8)
    now, was = ([step_of(data, i, **changed) for i in range(3)] for changed in (dict(images=noise), {}))
    found = reproduction.batch_differences(now, was, lambda: data)
    assert len(found) == 11 and found[10] == "14 more examples differ, the last one in step 3"
    assert "step 2: image 2 of 8" in found[9]


def test_metrics_are_compared_bit_by_bit():
    def steps(*losses, norm=1.0):
        return [
            {"step": i, "metrics": {"grad_norm": norm.hex(), "loss": float(loss).hex()}}
            for i, loss in enumerate(losses, 1)
        ]

    assert not reproduction.metric_differences(steps(1, 2, 3), steps(1, 2, 3))
    almost = float(np.nextafter(2.0, 3))
    (line,) = reproduction.metric_differences(steps(1, almost, 4), steps(1, 2, 3))
    assert line == "step 2: loss 2, was 2 (relative 2.2e-16); first difference"
    (line,) = reproduction.metric_differences(steps(1, norm=1.5), steps(1))
    assert line.startswith("step 1: grad_norm 1.5, was 1 ")
    assert reproduction.summary(0, [], 20) == "20 steps repeat bitwise"
    assert reproduction.summary(1, [], 20) == "1 thing differs, but all metrics of 20 steps are equal"
    assert reproduction.summary(0, [line], 20) == "the losses of 20 steps are equal, other metrics differ"
    assert reproduction.summary(0, ["step 2: loss 2"], 20) == "the losses differ within 20 steps"


def test_settings_weights_and_sources_are_named():
    was = runcard.flat(tiny("stage2"))
    now = copy.deepcopy(was) | {"optimizer.learning_rate": 0.005, "data.records": "/elsewhere"}
    now["init_from"][0]["checkpoint"] = "/elsewhere/stage1"  # places are compared by their contents
    (line,) = reproduction.config_differences(now, was)
    assert line == f"config.optimizer.learning_rate 0.005, was {was['optimizer.learning_rate']}"
    a, b = ({"path": "/runs/stage1", "step": step, "digest": step * 8} for step in "12")
    assert reproduction.weight_differences([b], [a]) == [
        "initial weights: /runs/stage1 step 2 (digest 22222222), was /runs/stage1 step 1 (digest 11111111)"
    ]
    assert reproduction.weight_differences([a | {"path": "/moved"}], [a]) == []
    headers = ({"sources": "scenes; folder:/x", "fingerprints": ["s", digest], "records": [4, 2]} for digest in "fg")
    assert reproduction.data_differences(*headers) == ["data: fingerprint of folder:/x f, was g"]


def test_initial_weights_have_the_digests_of_their_files(run, tmp_path):
    (entry,) = runcard.weights(tiny("selector"), run / "selector")
    step = run / "encoder" / "checkpoints" / str(STEPS)
    digest = json.loads((step / "digests.json").read_text())["self"][:16]
    assert entry == {"path": str(run / "encoder"), "step": str(STEPS), "digest": digest}
    published = tmp_path / "published"
    published.mkdir()
    found = []
    for weight in (b"0", b"1"):
        (published / "model.safetensors").write_bytes(weight)
        config = tiny("selector", init_from=(dict(checkpoint=str(published), rename=[("", "")]),))
        found += runcard.weights(config, tmp_path)
    assert found[0]["path"] == str(published) and found[0]["digest"] != found[1]["digest"]


def test_a_copy_without_its_history_has_the_commit_of_its_launcher(monkeypatch, tmp_path):
    monkeypatch.setattr(runcard, "__file__", str(tmp_path / "unimm_jax" / "runcard.py"))
    assert runcard.commit() == ""
    monkeypatch.setenv("UNIMM_COMMIT", "0123abcd")
    assert runcard.commit() == "0123abcd"


def test_bands_are_quantiles_of_twentieths():
    rows = [{"step": step, "loss": float(step)} for step in range(1, 101)]
    found = runcard.bands(rows, 100)
    assert len(found) == 20 and found[1] == {"steps": "6-10", "p10": 6.4, "median": 8.0, "p90": 9.6}
    assert runcard.bands(rows[:5], 100) == found[:1]


def test_a_damaged_or_missing_card_is_one_line(tmp_path):
    with pytest.raises(DataError, match=r"has no runcard.json; give the workdir"):
        runcard.read(tmp_path)
    (tmp_path / "runcard.json").write_text('{"format": 1, "sess')
    with pytest.raises(DataError, match=r"runcard.json is damaged .*; train again"):
        runcard.read(tmp_path)
    (tmp_path / "runcard.json").write_text(
        '{"format": 9, "sessions": [], "config": 0, "weights": 0, "data": 0, "steps": 0}'
    )
    with pytest.raises(DataError, match="format 9, this version reads up to 1"):
        runcard.read(tmp_path)
