import collections
import dataclasses
import html
import json
import re

import numpy as np
import pytest
from helpers import arguments, command, tiny, with_records
from PIL import Image

from unimm_jax import objectives, text_tokenizer
from unimm_jax.data import inspection, survey
from unimm_jax.data.outlines import Message, Question, Record
from unimm_jax.data.packing import PackingConfig, SourceShare
from unimm_jax.data.pipeline import Input, layout_of
from unimm_jax.data.plan import Plan
from unimm_jax.data.records import Records, RecordWriter
from unimm_jax.data.tasks import TaskSettings
from unimm_jax.errors import ConfigError

OUTSIDE = re.compile(r"""(?:src|href|url)\s*[=(]\s*["']?(?!data:)\w+:|https?://|@import|<script|<link""")


def opened(stage, run, **changes):
    config = with_records(stage, run, **changes)
    return config, objectives.get(config.objective).open_input(config)


def cells(page, first):
    """The cells of the table row that starts with `first`."""
    row = next(row for row in re.findall(r"<tr>(.*?)</tr>", page) if re.match(rf"<td[^>]*>{first}</td>", row))
    return [html.unescape(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row)]


@pytest.fixture(scope="module")
def stage3(run):
    return opened("stage3", run)


def test_the_page_counts_what_the_plan_packs(stage3):
    config, data = stage3
    page = inspection.build(config, data)
    plan = data.rows.plan
    rows = [row for step in range(plan.window) for row in plan.rows(step)]
    counts = collections.Counter(example.task for row in rows for example in row)
    assert len(counts) == 3
    for task, count in counts.items():
        assert f"<h3>{task} <small>" in page
        assert cells(page, task)[3:5] == [f"{count / counts.total():.1%}", f"{count:,}"]
    assert cells(page, "number of records")[1] == f"{len(data.records):,}"
    assert (
        cells(page, "batch")[1]
        == f"{plan.batch} examples per step in {plan.rows_per_step} rows of {config.data.seq_len} tokens"
    )
    assert f"planned together: {plan.window * plan.batch} examples" in page and counts.total() == 96
    assert cells(page, "scenes:count=96")[1:] == ["96", "96", f"{counts.total()}", "100.0%"]
    assert page.count('class="doc"') == 24 and page.count('class="row"') == 6
    assert not OUTSIDE.search(page)


def test_targets_are_the_shares_of_the_tasks_that_apply(stage3):
    _, data = stage3
    found = survey.target_shares(data.rows.plan)
    assert found["question"] == pytest.approx(0.8) and found["caption"] == pytest.approx(0.05)
    assert found["edit"] == 0 and sum(found.values()) == pytest.approx(1)


def test_documents_show_the_loss(stage3):
    config, data = stage3
    found = survey.survey(data.rows.plan)
    shown = survey.chosen(found, 5)
    assert [example.task for example in shown] == ["caption", "question", "text_to_image", "caption", "question"]
    caption, question, image = (inspection.document(found, example) for example in shown[:3])
    item = data.records[shown[0].record]
    text = item.texts[0]
    assert re.search(rf'<span class="t loss" title="\d+ tokens?, loss weight 1">{re.escape(text)}</span>', caption)
    assert re.search(r'<span class="t" title="\d+ tokens?, not in the loss">', question)
    assert '<figure class="out loss"' in image and "<b>generated</b>: " in image and "<sup>×0.5</sup>" in image
    kept = min(int(item.keep[0].sum()), config.model["unified"].max_image_tokens)
    assert f"read: {kept} of {len(item.keep[0])} patches" in caption


def test_examples_that_do_not_fit_are_named(run, stage3):
    limit = max(tokens for tokens, _ in survey.survey(stage3[1].rows.plan).sizes.values()) - 1
    config, data = opened("stage3", run, data__seq_len=limit)
    page = inspection.build(config, data, documents=2, rows=1)
    reason = f"longer than {limit} tokens"
    count = data.rows.plan.reasons(data.rows.plan.first_window().rejected)[reason]
    assert count >= 1 and cells(page, reason) == [reason, f"{count} examples", "replaced by others"]
    assert page.count(f'<td class="x">{reason}</td>') == 1 + min(count, 2 * inspection.LISTED)
    assert 'class="bar long"' in page and "and are replaced" in page


def test_texts_are_escaped(run, tmp_path):
    tokenizer = Records(run / "records").text_tokenizer
    record = Record(
        "a<b>.png",
        [np.zeros((16, 16, 3), np.uint8)],
        captions=['<script>alert("1")</script> & more'],
        questions=[Question("<i>?", "<b>")],
    )
    header = dict(num_patches=4, codes=8, positions="grid", selection="argmax", image_size=16)
    writer = RecordWriter(tmp_path, tokenizer, dict(fingerprint="x", sources="<u>x", places=3))
    keep = np.array([[True, False, True, True]])
    writer.write(0, [(0, record, keep, np.arange(4)[None]), (0, Record("t", text="<i>x"), keep[:0], keep[:0])])
    writer.close(1, header)
    records = Records(tmp_path)
    config = with_records("stage3", run)
    packing = PackingConfig(1, 64, 2, 4, (("caption", 0.5), ("question", 0.5)))
    plan = Plan(records, packing, layout_of(records.header, tokenizer, config), 0)
    found = survey.survey(plan)
    parts = [*inspection.summary(config, Input(None), found), *inspection.document_list(found, 9)]
    page = "".join([*parts, *inspection.row_list(found, 9), *inspection.dropped_list(found)])
    assert not re.search(r"<(script|i|u)>", page) and "<b>." not in page and "a&lt;b&gt;.png" in page
    assert cells(page, "no task of config.data.tasks applies") and "skipped 1 of 3 records" in page
    assert survey.without_task(plan, 5) == [1]


def test_a_mixture_of_other_tasks(tmp_path):
    tokenizer = text_tokenizer.train(["make it red", "what is this? a dog"], 300)
    pixels = np.full((16, 16, 3), 90, np.uint8)
    ask = [Message("user", (0, "what is this?")), Message("assistant", ("a dog",))]
    stored = [
        *[(0, Record(f"chat{i}", [pixels], messages=ask)) for i in range(3)],
        (1, Record("edit", [pixels, pixels], instruction="make it red")),
        (1, Record("page", [pixels], content=("a dog", 0, "what is this?"))),
    ]
    writer = RecordWriter(tmp_path, tokenizer, dict(fingerprint="x", sources="llava:/a;edit:/b", places=5))
    masks = np.array([[True, False, True, True]] * 2)
    codes = np.arange(4)[None].repeat(2, 0)
    writer.write(0, [(n, record, masks[: len(record.images)], codes[: len(record.images)]) for n, record in stored])
    writer.close(1, dict(num_patches=4, codes=8, positions="grid", selection="argmax", image_size=16))
    records = Records(tmp_path)
    layout = dataclasses.replace(layout_of(records.header, tokenizer, tiny("stage3")), max_image_tokens=2)
    shares = (("conversation", 1.0), ("edit", 1.0), ("interleaved", 1.0))
    sources = (SourceShare(0, 1.0), SourceShare(1, 3.0, (("edit", 1.0), ("interleaved", 0.5))))
    packing = PackingConfig(5, 200, 4, 2, shares, tasks=TaskSettings(template="chatml"), sources=sources)
    plan = Plan(records, packing, layout, 0)
    found = survey.target_shares(plan)
    assert found == pytest.approx({"conversation": 0.25, "edit": 0.375, "interleaved": 0.375})
    first = survey.survey(plan)
    page = "".join([*inspection.document_list(first, 9), *inspection.source_table(first)])
    assert {example.task for example in first.packed} == set(found)
    assert "&lt;|im_start|&gt;user" in page and "2 codes, 1 more are cut" in page and "read: 2 of 4 patches" in page
    assert cells(page, "edit:/b")[1:4] == ["2", "3", "3"]


@pytest.mark.parametrize(
    ("sizes", "limit"), [([3], 64), ([5, 60], 64), ([5, 64, 65], 64), ([5, 9000], 64), ([9], 2048), ([63], 62)]
)
def test_the_histogram_marks_the_length_of_a_row(sizes, limit):
    svg = inspection.histogram(np.array(sizes), limit)
    bars = re.findall(r'<rect class="(bar[ a-z]*)" x="([\d.]+)" [^>]*><title>([^<]*): (\d+) examples', svg)
    assert sum(int(count) for *_, count in bars) == len(sizes)
    assert sum(int(count) for kind, *_, count in bars if kind == "bar long") == sum(size > limit for size in sizes)
    assert f"seq_len {limit:,}" in svg
    if marker := re.search(r'<line class="limit" x1="([\d.]+)"', svg):
        assert all((float(x) >= float(marker[1]) - 0.1) == (kind == "bar long") for kind, x, *_ in bars)
    else:
        assert max(sizes) < limit


def test_stages_that_read_images_have_pages(run, tmp_path):
    for i in range(4):
        Image.new("RGB", (20, 12), "red").save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("a <b>red</b> image" if i else "")
    config, data = opened("encoder", run, data__sources=str(tmp_path), data__held_out=0.0)
    page = inspection.build(config, data, documents=3)
    assert page.count("<figure>") == 3 and "a &lt;b&gt;red&lt;/b&gt; image" in page
    assert "its caption is empty" in page and not OUTSIDE.search(page)
    config, data = opened("pixel_decoder", run)
    page = inspection.build(config, data, documents=3)
    assert page.count("<figure>") == 3 and "codes " in page and not OUTSIDE.search(page)
    with pytest.raises(ConfigError, match="not made of images or packed rows"):
        inspection.build(config, dataclasses.replace(data, rows=None))


def test_the_command_writes_the_page_and_names_missing_records(run, tmp_path):
    flags = ["--config=stage3:laptop", *arguments("stage3"), f"--workdir={tmp_path / 'x' / 'stage3'}"]
    done = command("inspect_data", *flags)
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "records holds no finished records" in done.stderr
    done = command("inspect_data", *flags, f"--config.data.records={run / 'records'}", "--documents=2", "--rows=1")
    assert done.returncode == 0, done.stderr
    assert json.dumps(done.stdout).endswith('data.html\\n"') and str(tmp_path) in done.stdout
    assert (tmp_path / "x" / "stage3" / "data.html").read_text().count('class="doc"') == 2
