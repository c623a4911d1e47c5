"""The judges of scenes and of files, and runs of a judge over drawings."""

import json
import re
import threading
import time

import numpy as np
import pytest
from helpers import ROOT, command, paint, write_drawings

from unimm_jax.data import scenes
from unimm_jax.data.scene_language import parse
from unimm_jax.enhancement import assessing, drawings, journal, judges
from unimm_jax.enhancement.assessing import assess
from unimm_jax.enhancement.judge_scenes import seen, verdict_on
from unimm_jax.enhancement.judges import Judge, open_judge
from unimm_jax.enhancement.verdicts import CATEGORIES, Verdict
from unimm_jax.errors import DataError, JudgeError
from unimm_jax.evals import scene_detector as detector
from unimm_jax.evals.scene_detector import detect

# ---- Scenes ----------------------------------------------------------------------------------------------------------


def flags(prompt, image):
    """The categories that fit, by their first letters."""
    verdict = verdict_on(parse(prompt), detect(image))
    return "".join(name[0] if name != "count" else "n" for name in CATEGORIES if verdict.category(name))


@pytest.mark.parametrize(
    ("prompt", "drawn", "fit"),
    [
        ("a red circle", "a red circle", "oncs"),
        ("a red circle", "a blue circle", "ons"),
        ("a red circle", "a red square", "s"),
        ("a circle", "a red square", "cs"),
        ("a red circle", "two red circles", "ocs"),
        ("two red circles and a blue square", "a red circle and a blue square", "ocs"),
        ("two red circles and a blue square", "a blue circle and a blue square", "os"),
        ("two red circles", "two red circles and a blue square", "cs"),
        ("three circles", "two blue circles and a red circle", "oncs"),
        ("a red circle and a blue circle", "two red circles", "ons"),
        ("a circle left of a square", "a circle left of a square", "oncs"),
        ("a circle left of a square", "a circle right of a square", "onc"),
        ("a red circle above a blue circle", "a blue circle above a red circle", "onc"),
        ("a red circle above a blue circle", "a green circle above a blue circle", "on"),
        ("a circle left of a square", "a circle", "c"),
    ],
)
def test_categories_of_drawn_scenes(prompt, drawn, fit):
    assert flags(prompt, paint(drawn)) == fit


def test_real_images_are_good_for_all_their_captions_and_described_by_the_first():
    good, described, texts = 0, 0, 0
    for index in range(120):
        scene = scenes.draw_scene(0, "train", index)
        found = detect(scenes.render(scene))
        captions = scenes.captions(scene)
        described += seen(found) == captions[0]
        good += sum(verdict_on(parse(caption), found).good for caption in captions)
        texts += len(captions)
    assert good >= 0.99 * texts and described >= 118


def test_good_is_the_strict_rule_of_the_detector():
    """On prompts against images of other prompts, many of which are nearly right."""
    counts = {True: 0, False: 0}
    for task in scenes.TASKS:
        prompts = [scenes.draw_prompt(task, 1, index) for index in range(12)]
        there = [(other, detect(paint(other.text))) for other in prompts]
        for prompt in prompts:
            for other, found in there:
                strict = detector.judge(prompt, found)[1]
                assert verdict_on(parse(prompt.text), found).good == strict, (prompt, other)
                counts[strict] += 1
    assert min(counts.values()) > 72


def test_unclear_objects_and_empty_images():
    image = paint("a red circle")
    image[20:24, 4:60] = (20, 20, 20)  # a bar, which is no shape
    verdict = verdict_on(parse("a red circle"), detect(image))
    assert "something unclear" in verdict.seen and not verdict.object and not verdict.count
    blank = verdict_on(parse("a red circle"), detect(paint("a red circle", good=False)))
    assert blank.seen == "nothing" and blank.number_right == 1 and blank.spatial


# ---- Runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(drawings, "BLOCK", 8)
    return write_drawings(tmp_path / "drawings", 20)[0]


def rows(folder):
    return [
        json.loads(line) for file in sorted(folder.glob("verdicts-*.jsonl")) for line in file.read_text().splitlines()
    ]


class ScriptedJudge(Judge):
    """Does what `script` says for each drawing: returns, or raises."""

    workers = 3

    def __init__(self, script, patience=0):
        self.script, self.patience, self.calls = script, patience, []

    def identity(self):
        return {"judge": "scripted"}

    def assess(self, drawing, image):
        self.calls.append(drawing.index)
        return self.script(drawing.index)


def run(drawn, monkeypatch, script, patience=0):
    judge = ScriptedJudge(script, patience)
    monkeypatch.setattr(assessing, "open_judge", lambda description: judge)
    try:
        return judge, assess(str(drawn.path), "scripted")
    except DataError as error:
        return judge, error


GOOD = Verdict("x", True, True, True, True)


def test_the_scenes_judge_assesses_every_drawing_once(drawn, capsys):
    summary = assess(str(drawn.path), "scenes")
    assert summary["assessed"] == 20 and summary["good"] + summary["bad"] == 20 and not summary["remaining"]
    assert 0 < summary["good"] < 20  # the painter draws about half of them right
    found = rows(drawn.path / "verdicts")
    assert sorted(row["index"] for row in found) == list(range(20))
    assert "verdicts: 20 of 20 drawings" in capsys.readouterr().out
    assert assess(str(drawn.path), "scenes") == summary and len(rows(drawn.path / "verdicts")) == 20
    with pytest.raises(DataError, match=r"holds verdicts of another run \(judge, path differ"):
        assess(str(drawn.path), "file:" + str(drawn.path / "verdicts" / "verdicts-0.jsonl"))


def test_failures_are_counted_and_tried_again(drawn, monkeypatch, capsys):
    def fails_on_odd(index):
        if index % 2:
            raise JudgeError("timed out" if index % 4 == 1 else "malformed reply", "details")
        return GOOD

    judge, summary = run(drawn, monkeypatch, fails_on_odd)
    assert summary["assessed"] == 10 and summary["remaining"] == 10
    assert summary["failed"] == {"timed out": 5, "malformed reply": 5}
    said = capsys.readouterr().out
    assert "10 failures in this run (malformed reply 5, timed out 5)" in said and "10 drawings have none" in said
    judge, summary = run(drawn, monkeypatch, lambda index: GOOD)
    assert sorted(judge.calls) == list(range(1, 20, 2)) and summary["assessed"] == 20 and summary["failed"] == {}


def test_failures_between_verdicts_do_not_stop_the_run(drawn, monkeypatch):
    def fails_on_odd(index):
        if index % 2:
            raise JudgeError("timed out")
        return GOOD

    monkeypatch.setattr(ScriptedJudge, "workers", 1)
    _, summary = run(drawn, monkeypatch, fails_on_odd, patience=2)
    assert summary["assessed"] == 10 and summary["failed"] == {"timed out": 10}


def test_drawings_on_which_the_judge_always_fails_come_last(drawn, monkeypatch):
    """They once came first in later runs and used up its patience, before any other drawing was assessed."""
    stops = [14]

    def fails_on_even(index):
        if index in stops:
            stops.remove(index)
            raise DataError("interrupted")
        if index % 2:
            return GOOD
        raise JudgeError("refused")

    monkeypatch.setattr(ScriptedJudge, "workers", 1)
    _, error = run(drawn, monkeypatch, fails_on_even, patience=3)
    assert str(error).startswith("interrupted")
    judge, summary = run(drawn, monkeypatch, fails_on_even, patience=3)
    assert summary["assessed"] == 10 and summary["failed"] == {"refused": 10}
    assert judge.calls[-7:] == list(range(0, 14, 2))
    judge, summary = run(drawn, monkeypatch, fails_on_even, patience=3)
    assert judge.calls == list(range(0, 20, 2)) and summary["remaining"] == 10


def test_a_dead_judge_stops_the_run_and_what_ends_meanwhile_is_saved(drawn, monkeypatch):
    released = threading.Event()

    def dies(index):
        if index < 5:
            return GOOD
        if index == 5:  # still running when the run stops
            released.wait(10)
            return GOOD
        raise JudgeError("connection failed", "refused")

    monkeypatch.setattr(ScriptedJudge, "close", lambda self: released.set())
    judge, error = run(drawn, monkeypatch, dies, patience=4)
    assert "failed 4 times in a row, the last time: connection failed: refused" in str(error)
    assert "6 of 20 drawings were assessed in this run; all verdicts so far are saved" in str(error)
    assert "\n" not in str(error)
    assert sorted(row["index"] for row in rows(drawn.path / "verdicts") if "failed" not in row) == list(range(6))
    _, summary = run(drawn, monkeypatch, lambda index: GOOD)
    assert summary["assessed"] == 20


def test_an_error_of_the_user_stops_at_once(drawn, monkeypatch):
    def refuses(index):
        time.sleep(0.01)
        raise DataError("the key is refused")

    judge, error = run(drawn, monkeypatch, refuses)
    assert str(error).startswith("the key is refused; 0 of 20 drawings were assessed") and len(judge.calls) <= 7


def test_a_bug_keeps_its_traceback_and_the_verdicts(drawn, monkeypatch):
    def breaks(index):
        if index == 7:
            raise ZeroDivisionError
        return GOOD

    with pytest.raises(ZeroDivisionError):
        run(drawn, monkeypatch, breaks)
    assert {row["index"] for row in rows(drawn.path / "verdicts")} >= set(range(4))


def test_a_half_written_line_is_repaired(drawn, monkeypatch):
    run(drawn, monkeypatch, lambda index: GOOD)
    file = drawn.path / "verdicts" / "verdicts-0.jsonl"
    data = file.read_bytes()
    lines = data.splitlines(keepends=True)
    last = json.loads(lines[-1])["index"]
    for damaged in (data[:-20], b"".join(lines[:-1]) + b'{"index": 3, "se\n'):
        file.write_bytes(damaged)
        judge, summary = run(drawn, monkeypatch, lambda index: GOOD)
        assert judge.calls == [last] and summary["assessed"] == 20
        assert sorted(row["index"] for row in rows(file.parent)) == list(range(20))
    file.write_bytes(b"{\n" + data)
    with pytest.raises(DataError, match="line 1, is damaged; remove the line"):
        journal.read_verdicts(file.parent)
    file.write_bytes(data + lines[0])
    with pytest.raises(DataError, match="has two verdicts"):
        journal.read_verdicts(file.parent)


def test_two_runs_at_once_are_refused(drawn, monkeypatch):
    (drawn.path / "verdicts").mkdir()
    first = journal.Journal(drawn.path / "verdicts", 0)
    _, error = run(drawn, monkeypatch, lambda index: GOOD)
    assert "another run writes" in str(error)
    first.close()


def test_blocks_are_split_over_processes(drawn, monkeypatch):
    monkeypatch.setattr("jax.process_count", lambda: 2)
    lines, calls = [], []

    def gather(line):  # the second process gets the first one's counts, too
        if line == b'""':  # no reason to stop
            return [line, line]
        lines.append(line)
        return lines

    def verdict(index):
        if index in (3, 8, 9):
            raise JudgeError("server error" if index == 9 else "timed out", "")
        return GOOD

    monkeypatch.setattr(assessing.distributed, "gather", gather)
    monkeypatch.setattr(assessing.distributed, "check_shared", lambda folder, flag: None)
    for process in (0, 1):
        monkeypatch.setattr("jax.process_index", lambda process=process: process)
        judge, summary = run(drawn, monkeypatch, verdict)
        calls.append(sorted(judge.calls))
    assert calls == [[*range(8), *range(16, 20)], list(range(8, 16))] and summary["assessed"] == 17
    assert summary["failed"] == {"server error": 1, "timed out": 2} and summary["remaining"] == 3


def test_a_bug_in_one_process_keeps_its_traceback_and_stops_the_others(monkeypatch):
    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr(assessing.distributed, "gather", lambda line: [line, b'"ZeroDivisionError()"'])
    with pytest.raises(ZeroDivisionError), assessing.raised_by_all():
        raise ZeroDivisionError
    with pytest.raises(DataError, match=r"^ZeroDivisionError\(\)$"), assessing.raised_by_all():
        pass
    with pytest.raises(DataError, match=r"^the key is refused; ZeroDivisionError\(\)$"), assessing.raised_by_all():
        raise DataError("the key is refused")


def test_prompts_of_other_data_are_counted_and_named(drawn, monkeypatch, capsys):
    file = drawn.path / "blocks" / "000000.jsonl"
    line, *rest = file.read_text().splitlines()
    file.write_text("\n".join([json.dumps(json.loads(line) | {"prompt": "a cat"}), *rest]))
    summary = assess(str(drawn.path), "scenes")
    assert summary["failed"] == {"prompt not of the scenes": 1} and summary["remaining"] == 1
    assert "1 drawings have none; it can assess only prompts of the scenes: draw with" in capsys.readouterr().out
    _, error = run(write_drawings(drawn.path.parent / "more", 3)[0], monkeypatch, _never)
    assert "none of the 3 drawings in" in str(error) and "(3 × unable)" in str(error)


def _never(index):
    raise JudgeError("unable")


# ---- Files and descriptions ------------------------------------------------------------------------------------------


def test_a_file_gives_verdicts_by_index_or_by_key_and_prompt(drawn, tmp_path, capsys):
    items = [drawing for block in drawn.complete() for drawing in drawn.block(block)]
    plain = dict(seen="x", object=True, count={"ok": False, "reason": "two"}, color=True, spatial=True)
    names = [{"index": items[0].index}, dict(key=items[1].key, prompt=items[1].prompt), {"index": 999}]
    file = tmp_path / "verdicts.jsonl"
    file.write_text("".join(json.dumps(name | plain) + "\n" for name in names))
    summary = assess(str(drawn.path), f"file:{file}", str(tmp_path / "out"))
    assert (summary["assessed"], summary["bad"], summary["wrong"]["count"]) == (2, 2, 2)
    assert summary["failed"] == {"no verdict in the file": 18}
    assert rows(tmp_path / "out")[0]["count"] == {"ok": False, "reason": "two"}
    assert summary["unused"] == 1 and "verdicts: 1 that the judge was given are of no image" in capsys.readouterr().out
    several = write_drawings(tmp_path / "several", 3, samples=2)[0]
    with pytest.raises(DataError, match="there are several of each; give an index"):
        assess(str(several.path), f"file:{file}", str(tmp_path / "more"))


def test_a_file_may_grow_but_verdicts_of_two_files_do_not_mix(drawn, tmp_path):
    lines = [json.dumps({"index": i, "seen": "x"} | dict.fromkeys(CATEGORIES, True)) + "\n" for i in range(20)]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for name, count in (("a", 8), ("b", 20)):
        (tmp_path / name / "people.jsonl").write_text("".join(lines[:count]))
    words = [f"--drawings={drawn.path}", f"--judge=file:{tmp_path}/a/people.jsonl"]
    done = command("self_enhance", "assess", *words)
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == (
        "error: 12 drawings have no verdict (no verdict in the file 12); add their verdicts to the file and run the "
        "command again. build works without them, too"
    )
    with pytest.raises(DataError, match=r"holds verdicts of another run \(path differ"):
        assess(str(drawn.path), f"file:{tmp_path}/b/people.jsonl")
    (tmp_path / "a" / "people.jsonl").write_text("".join(lines))
    assert assess(str(drawn.path), f"file:{tmp_path}/a/../a/people.jsonl")["assessed"] == 20


def test_the_journal_of_another_judge_is_a_file_of_verdicts(drawn, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        run(drawn, patch, lambda index: _never(index) if index == 3 else GOOD)
    journal = drawn.path / "verdicts" / "verdicts-0.jsonl"
    journal.write_text(journal.read_text() + '{"spent": 0.5}\n')
    assert any("failed" in row for row in rows(drawn.path / "verdicts"))
    summary = assess(str(drawn.path), f"file:{journal}", str(tmp_path / "out"))
    assert summary["assessed"] == 19 and summary["failed"] == {"no verdict in the file": 1}


def test_images_that_are_not_drawn_yet_are_counted(drawn, capsys):
    (drawn.path / "blocks" / "000002.jsonl").unlink()
    summary = assess(str(drawn.path), "scenes")
    assert (summary["assessed"], summary["remaining"], summary["not_drawn"]) == (16, 0, 4)
    assert "4 images are not drawn yet; run self_enhance generate again" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"index": 1}, "row 2: a verdict has no seen"),
        ({"index": 0, "seen": "x"} | dict.fromkeys(CATEGORIES, True), "row 2: drawing 0 has a second verdict"),
        ({"seen": "x"}, "row 2: it has neither an index nor a key and a prompt"),
    ],
)
def test_wrong_lines_of_a_file_are_named(tmp_path, line, message):
    file = tmp_path / "verdicts.jsonl"
    good = {"index": 0, "seen": "x"} | dict.fromkeys(CATEGORIES, True)
    file.write_text("\n".join(map(json.dumps, (good, line))))
    with pytest.raises(DataError, match=message):
        open_judge(f"file:{file}")


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ("people", "no judge 'people'; judges are scenes, file, endpoint"),
        ("scenes:count=3", "has no options"),
        ("file:", "needs a path"),
        ("file:/no/such.jsonl", "cannot be read"),
        ("endpoint:https://host/v1", "model is missing"),
        ("endpoint:https://host/v1,model=m,workers=0,timeout=0", "workers must be at least 1; timeout must be above 0"),
        ("endpoint:https://host/v1,model=m,worker=3", "has no option 'worker'; it has model, workers"),
        ("endpoint:https://host/v1,model=m,workers=x", "workers='x' of the judge endpoint is not a number"),
        ("endpoint:https://host/v1,model=m,model=n", "option model twice"),
        ("endpoint:https://host/v1,model=m,max_cost=1", "max_cost needs price_in and price_out"),
        ("endpoint:ftp://host/v1,model=m", "needs a URL such as"),
        ("endpoint:https://key@host/v1,model=m", "without a user"),
    ],
)
def test_wrong_descriptions_are_named(description, message):
    with pytest.raises(DataError, match=message):
        open_judge(description)


def test_the_judge_of_the_docs(drawn, tmp_path, monkeypatch):
    page = (ROOT / "docs" / "self_enhancement.md").read_text()
    code = re.search(r"judge_brightness.py`:\n\n```python\n(.*?)```", page, re.DOTALL)[1]
    (tmp_path / "judge_brightness.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(judges.REGISTRY, "brightness", "judge_brightness:BrightnessJudge")
    assert assess(str(drawn.path), "brightness:100", str(tmp_path / "a"))["good"] == 20
    assert assess(str(drawn.path), "brightness:255", str(tmp_path / "b"))["wrong"]["object"] == 20


def test_every_registered_judge_exists():
    assert set(judges.REGISTRY) == {"scenes", "file", "endpoint"}
    assert isinstance(open_judge("scenes"), Judge)
    image = paint("a red circle")
    item = drawings.Drawing(0, 0, "k", "a red circle", 0, "x.png", 0)
    assert open_judge("scenes").assess(item, np.array(image)).good
