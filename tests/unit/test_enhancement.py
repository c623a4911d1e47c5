"""Drawings that resume, documents from verdicts, and the evaluator of assessments, without a trained model."""

import hashlib
import json
import types

import numpy as np
import pytest
from helpers import FakePainter, FakeRecords, paint, write_drawings

from unimm_jax.data import scene_language, tasks
from unimm_jax.data.documents import ImageIn, ImageOut, Text
from unimm_jax.data.outlines import flatten, outline
from unimm_jax.data.sources import open_source
from unimm_jax.data.transforms import to_pixels
from unimm_jax.enhancement import drawings
from unimm_jax.enhancement.assessing import assess
from unimm_jax.enhancement.building import build
from unimm_jax.enhancement.drawings import Drawings, DrawingSettings, draw_blocks, select
from unimm_jax.enhancement.judge_scenes import verdict_on
from unimm_jax.enhancement.verdicts import CORRECTION, Verdict, from_text, question
from unimm_jax.errors import ConfigError, DataError, UserError
from unimm_jax.evals import complete, report_page, score_table
from unimm_jax.evals.assessments import Assessments, AssessmentsOptions, caption
from unimm_jax.evals.base import Context
from unimm_jax.evals.scene_detector import detect
from unimm_jax.inference import best_of, requests
from unimm_jax.inference.sampling import SAMPLED


def contents(folder):
    """The digest of every file of a directory."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(drawings, "BLOCK", 8)


# ---- Drawings --------------------------------------------------------------------------------------------------------


def test_a_share_of_the_records_is_chosen_by_a_hash(monkeypatch):
    stored = FakeRecords(300)
    (some, _), (more, unusable) = select(stored, 0.2, 3), select(stored, 0.5, 3)
    assert 30 < len(some) < 90 and set(some) < set(more) and some == select(stored, 0.2, 3)[0]
    assert len(select(stored, 1.0, 3)[0]) == 300 and not select(stored, 0.0, 3)[0]
    assert select(stored, 0.2, 4)[0] != some and unusable == 0
    texts = [text for _, text in more]
    assert len(set(texts)) > 3 and all(text < len(stored[record].texts) for record, text in more)
    for record, text in more:  # questions and answers are texts of the record, too
        scene_language.parse(stored[record].texts[text])
    monkeypatch.setattr(drawings, "MAX_TOKENS", 20)
    short, unusable = select(stored, 0.5, 3)
    assert unusable > 10 and len(short) + unusable == len(more)
    assert all(len(stored[record].texts[text]) <= 20 for record, text in short)


def test_an_interrupted_run_gives_the_same_drawings(tmp_path):
    whole, stored = write_drawings(tmp_path / "a", 20, samples=2)
    again, _ = write_drawings(tmp_path / "b", 20, samples=2)
    (tmp_path / "b" / "blocks" / "000002.jsonl").unlink()
    (tmp_path / "b" / "images" / "000002" / "00000017.png").write_bytes(b"half")
    painter = FakePainter()
    settings, identity = DrawingSettings(share=1.0, samples=2), dict(whole.header)
    for name in ("drawings", "block", "blocks"):
        del identity[name]
    draw_blocks(painter, stored, select(stored, 1.0, 0)[0], tmp_path / "b", settings, identity)
    assert len(painter.asked) == 1 and len(painter.asked[0][0]) == 8
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    items = [item for block in again.complete() for item in again.block(block)]
    assert [item.index for item in items] == list(range(40)) and len(again) == 40
    assert all(items[i].prompt == items[i + 1].prompt for i in range(0, 40, 2))
    assert all(stored[item.record].texts[item.text] == item.prompt for item in items)
    assert len({item.seed for item in items}) == 5
    assert whole.image(items[0]).shape == (64, 64, 3)


def test_processes_share_the_blocks(tmp_path, monkeypatch):
    write_drawings(tmp_path / "one", 20)
    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr(drawings.multihost_utils, "sync_global_devices", lambda name: None)
    monkeypatch.setattr(drawings.distributed, "check_shared", lambda folder, flag: None)
    for process, blocks in ((1, [1]), (0, [0, 1, 2])):
        monkeypatch.setattr("jax.process_index", lambda process=process: process)
        assert write_drawings(tmp_path / "two", 20)[0].complete() == blocks
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_drawings_of_other_runs_are_refused(tmp_path):
    write_drawings(tmp_path / "a", 10)
    with pytest.raises(
        DataError, match=r"holds drawings of another run \(settings differ\); remove it or give another"
    ):
        write_drawings(tmp_path / "a", 10, seed=1)
    with pytest.raises(DataError, match=r"\(records, drawings, blocks differ\)"):
        write_drawings(tmp_path / "a", 20)
    with pytest.raises(DataError, match="has no header.json; draw images with"):
        Drawings(tmp_path)
    found = Drawings(tmp_path / "a")
    item = found.block(0)[3]
    (tmp_path / "a" / item.image).unlink()
    with pytest.raises(DataError, match=r"is missing; remove .*000000.jsonl and draw images"):
        assess(str(tmp_path / "a"), "scenes")
    (tmp_path / "a" / item.image).write_bytes(b"PNG")
    with pytest.raises(DataError, match=r"00000003.png is damaged \(not a readable image"):
        found.image(item)


# ---- Documents -------------------------------------------------------------------------------------------------------


@pytest.fixture
def assessed(tmp_path, monkeypatch):
    """Drawings with verdicts of the exact judge: (directory, records, drawings)."""
    found, stored = write_drawings(tmp_path / "drawings", 30)
    monkeypatch.setattr("unimm_jax.enhancement.building.Records.open", lambda path: stored)
    assess(str(found.path), "scenes")
    return found.path, stored, [item for block in found.complete() for item in found.block(block)]


def test_documents_are_read_by_the_source_chat(assessed, tmp_path, capsys):
    folder, stored, items = assessed
    summary = build(str(folder), "records", str(tmp_path / "out"))
    assert summary["assessed"] == 30 and min(summary["good"], summary["bad"]) > 5
    assert "documents: 30 in " in capsys.readouterr().out
    source = open_source(f"chat:{tmp_path}/out/documents.jsonl", held_out=0.0)
    assert len(source) == 30
    for i, item in enumerate(items):
        record = source[i]
        verdict = verdict_on(scene_language.parse(item.prompt), detect(to_pixels(record.images[0], 64)))
        asked = [record.messages[0].content, record.messages[1].content]
        assert asked == [[0, question(item.prompt)], [verdict.to_text()]]
        document = tasks.CONVERSATION.build(outline(flatten(record)[1], len(record.images)), 0, tasks.TaskSettings())
        kinds = [(type(s), getattr(s, "weight", None)) for s in document if isinstance(s, ImageIn | ImageOut | Text)]
        assert kinds[0][0] is ImageIn and kinds[1] == (Text, 0.0) and kinds[2] == (Text, 1.0)
        if verdict.good:
            assert len(record.images) == 1 and len(kinds) == 3
            continue
        assert record.messages[2].content == [CORRECTION] and record.messages[3].content == [1]
        assert record.images[1] == stored[item.record].images[0]  # so pretokenize gives the codes of the real image
        assert kinds[3] == (Text, 0.0) and kinds[4][0] is ImageOut
    before = contents(tmp_path / "out")
    assert build(str(folder), "records", str(tmp_path / "out")) == summary and contents(tmp_path / "out") == before
    build(str(folder), "records", str(tmp_path / "again"))
    assert contents(tmp_path / "again") == before


def test_the_share_of_bad_images_is_limited(assessed, tmp_path):
    folder, _, _ = assessed
    whole = build(str(folder), "records", str(tmp_path / "whole"))
    few = build(str(folder), "records", str(tmp_path / "few"), max_bad_share=0.25)
    assert few["good"] == whole["good"] and few["bad"] == whole["good"] // 3
    assert few["surplus"] == whole["bad"] - few["bad"]
    none = build(str(folder), "records", str(tmp_path / "none"), max_bad_share=0.0)
    assert none["bad"] == 0
    with pytest.raises(DataError, match=r"holds documents of another run \(max_bad_share differ"):
        build(str(folder), "records", str(tmp_path / "few"), max_bad_share=0.5)


def test_duplicates_and_drawings_without_a_verdict_are_counted(assessed, tmp_path):
    folder, _, _ = assessed
    first, second, *others = Drawings(folder).block(0)
    twice = [vars(first), vars(second) | {"prompt": first.prompt}, *map(vars, others)]
    (folder / "blocks" / "000000.jsonl").write_text("\n".join(map(json.dumps, twice)))
    (folder / second.image).write_bytes((folder / first.image).read_bytes())
    journal = folder / "verdicts" / "verdicts-0.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(line for line in lines if json.loads(line)["index"] != 29))
    summary = build(str(folder), "records", str(tmp_path / "out"))
    assert (summary["duplicates"], summary["without_verdict"], summary["assessed"]) == (1, 1, 28)


def test_verdicts_that_a_model_cannot_write_are_left_out(assessed, tmp_path, capsys):
    """The fake tokenizer counts words; the categories have ten."""
    folder, _, items = assessed
    journal = folder / "verdicts" / "verdicts-0.jsonl"
    found = [json.loads(line) for line in journal.read_text().splitlines()]
    for row, words in zip(found, (86, 87, 5000), strict=False):
        row["seen"] = " ".join(["x"] * words)
    journal.write_text("".join(json.dumps(row) + "\n" for row in found))
    summary = build(str(folder), "records", str(tmp_path / "out"))
    assert (summary["assessed"], summary["too_long"], summary["without_verdict"]) == (28, 2, 0)
    assert "2 with a verdict of more than 96 tokens" in capsys.readouterr().out
    left = [json.loads(line)["drawing"] for line in (tmp_path / "out" / "documents.jsonl").read_text().splitlines()]
    assert sorted(item.index for item in items if item.index not in left) == sorted(r["index"] for r in found[1:3])
    journal.write_text("".join(json.dumps(row | {"seen": "x " * 87}) + "\n" for row in found))
    with pytest.raises(DataError, match="no document is left: all 30 verdicts have more than 96 tokens"):
        build(str(folder), "records", str(tmp_path / "none"))


def test_what_does_not_belong_together_is_refused(assessed, tmp_path):
    folder, stored, _ = assessed
    with pytest.raises(DataError, match="has no header.json; assess the drawings with"):
        build(str(folder), "records", str(tmp_path / "out"), str(tmp_path / "nothing"))
    other = write_drawings(tmp_path / "other", 10)[0]
    with pytest.raises(DataError, match="are not on the drawings in"):
        build(str(other.path), "records", str(tmp_path / "out"), str(folder / "verdicts"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("mine")
    with pytest.raises(DataError, match="is not empty; remove it or give another --output"):
        build(str(folder), "records", str(tmp_path / "full"))
    stored.header = {"contents": "others"}
    with pytest.raises(DataError, match="are not of the records in records"):
        build(str(folder), "records", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_report_says_which_seconds_are_of_the_last_start():
    parts = report_page.time_table({"drawings": 3.0, "stage3": 4.0}, {"stage3": {"compile": 1.0}})
    assert "the other stages count the last one, so what an interrupted start took is missing" in parts[-1]


# ---- Evaluator -------------------------------------------------------------------------------------------------------


class FakeGenerator:
    """Draws the images right whose place is not divisible by three, and says what `says` gives for prompt and image."""

    answer_length = 96

    def __init__(self, says, right=lambda i: i % 3 != 0):
        self.decoders = {"pixel_decoder": None}
        self.config = types.SimpleNamespace(data=types.SimpleNamespace(image_size=64))
        self.says, self.right, self.drawn = says, right, []

    def input_size(self, images):
        return images

    def generate_images(self, prompts, sampling, seed, decoder="", size=None):
        assert not decoder and not size
        self.drawn.append((list(prompts), sampling.guidance, seed))
        return np.stack([paint(prompt, self.right(i)) for i, prompt in enumerate(prompts)])

    def generate_text(self, images, questions):
        prompts = [text.removeprefix("does the image show ").removesuffix("?") for text in questions]
        return [self.says(prompt, image) for prompt, image in zip(prompts, images, strict=True)]


def knows(prompt, image):
    return verdict_on(scene_language.parse(prompt), detect(image)).to_text()


def praises(prompt, image):
    return Verdict(prompt, True, True, True, True).to_text()


CONTEXT = Context(types.SimpleNamespace(name="x"), None, None, 0, None, "run/stage3", {}, None)


@pytest.mark.parametrize(("says", "agreement", "unparsed"), [(knows, 1, 0), (praises, 0.5, 0), (lambda *_: "?", 0, 1)])
def test_assessments_are_compared_with_the_exact_judge(says, agreement, unparsed):
    generator = FakeGenerator(says)
    result = Assessments(AssessmentsOptions(drawings=12, best_of=18, guidance=2.0)).score(generator, CONTEXT)
    scores, chosen = result.scores, result.scores["best_of_4"]
    assert scores["assessment_drawings"] == {"right": 6, "wrong": 6}
    assert (scores["assessment_agreement"], scores["assessment_unparsed"]) == (agreement, unparsed)
    if says is praises:
        assert scores["assessment_agreement_by_side"] == {"right": 1, "wrong": 0}
    assert set(scores["assessment_agreement_by_category"]) == {"object", "count", "color", "spatial"}
    # of four images in a row, place 0, 3, 6, 9 … is wrong, so the first one is wrong for a third of the prompts
    assert chosen["one_sample"] == pytest.approx(2 / 3) and chosen["oracle"] == 1
    assert chosen["best_of_4"] == pytest.approx(1 if says is knows else 2 / 3)
    assert chosen["difference"] == pytest.approx(chosen["best_of_4"] - chosen["one_sample"])
    low, high = chosen["interval"]
    assert 0 < low < 1 / 3 < high if says is knows else (low, high) == (0, 0)
    rows = result.examples["assessments"]
    assert len(rows) == 12 and all(
        row["right"] == (row["reply"] == row["truth"]) for row in rows if says is not praises
    )
    assert [guidance for _, guidance, _ in generator.drawn] == [2.0] * len(generator.drawn)
    assert f"of {6} right images" in score_table.table(scores)


def test_rounds_end_when_one_side_stays_short():
    generator = FakeGenerator(knows, right=lambda i: i == 0)
    result = Assessments(AssessmentsOptions(drawings=12, best_of=1)).score(generator, CONTEXT)
    assert result.scores["assessment_drawings"] == {"right": 4, "wrong": 6}  # one of each of four rounds
    rounds = [prompts for prompts, _, _ in generator.drawn[:4]]
    assert sum(rounds, []) == [caption(i) for i in range(48)]
    only_bad = Assessments(AssessmentsOptions(drawings=4, best_of=1)).score(
        FakeGenerator(knows, right=lambda i: False), CONTEXT
    )
    assert only_bad.scores["assessment_drawings"] == {"right": 0, "wrong": 2}
    assert only_bad.scores["assessment_agreement_by_side"] == {"wrong": 1}
    assert "of 2 wrong images" in score_table.table(only_bad.scores)


def test_without_a_decoder_nothing_is_assessed(capsys):
    generator = FakeGenerator(knows)
    generator.decoders = {}
    assert Assessments(AssessmentsOptions()).score(generator, CONTEXT).scores == {}
    assert "assessment is not scored" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="drawing"):
        complete("x", {"type": "assessments", "drawing": 3})


def test_the_best_of_several_images():
    yes, no = Verdict("x", True, True, True, True), Verdict("x", True, False, False, True)
    nearly = Verdict("x", True, False, True, True)
    for verdicts, index in (
        ([no, yes, yes, None], 1),
        ([no, nearly, None, nearly], 1),
        ([None, None], 0),
        ([None, no], 1),
        ([nearly, no], 0),
    ):
        assert best_of.choose(verdicts) == index
    generator = FakeGenerator(knows)
    prompts = ["a red circle", "two squares", "a cross above a circle"]
    found = best_of.candidates(generator, prompts, 4, SAMPLED, 5)
    assert generator.drawn == [([p for p in prompts for _ in range(4)], 1.0, 5)]
    assert found.images.shape == (3, 4, 64, 64, 3) and found.chosen == [1, 0, 0]
    asked = requests.check(requests.Request(prompt=prompts[0], samples=2, best_of=3, sampled=SAMPLED, seed=5))
    assert asked.request.batch == 6 and asked.request.answer_length == 96
    answer = requests.answer(asked, generator)
    shown = best_of.candidates(generator, prompts[:1] * 2, 3, SAMPLED, 5)
    assert list(answer.images) == ["0000", "0001"] and np.array_equal(np.stack([*answer.images.values()]), shown.best)
    assert answer.texts[0] == f"0000: {shown.verdicts[0][shown.chosen[0]].to_text()}"
    best = best_of.best_images(generator, prompts, 4, SAMPLED, 5)
    assert np.array_equal(best, found.images[[0, 1, 2], [1, 0, 0]])
    assert all(from_text(knows(p, image)).good for p, image in zip(prompts, best, strict=True))
    generator.answer_length = 40
    with pytest.raises(UserError, match="a verdict has up to 96 tokens"):
        best_of.best_images(generator, prompts, 4)
