import base64
import io
import json
import logging
import os

import numpy as np
import pytest
from PIL import Image

from unimm_jax.data import sources
from unimm_jax.data.outlines import Message, flatten
from unimm_jax.data.sources import files
from unimm_jax.errors import DataError, InvalidRecordError


def _png(red):
    buffer = io.BytesIO()
    Image.new("RGB", (12, 10), (red, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


PNG = [_png(red) for red in (10, 60, 110, 160)]
INLINE = "data:image/png;base64," + base64.b64encode(PNG[3]).decode()


@pytest.fixture
def data(tmp_path):
    """A directory with the images p/0.png, p/1.png and p/2.png."""
    (tmp_path / "p").mkdir()
    for i in range(3):
        (tmp_path / "p" / f"{i}.png").write_bytes(PNG[i])
    return tmp_path


def _lines(*rows):
    """JSON Lines; a row that is bytes is written as it is."""
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


def _open(data, kind, content, options=""):
    file = data / ("rows.json" if kind == "coco" else "rows.jsonl")
    file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return sources.open_source(f"{kind}:{file}{options}", held_out=0.0)


def _llava(*turns, **fields):
    return {"id": "a", **fields, "conversations": [{"from": who, "value": value} for who, value in turns]}


def _chat(content, role="user", **fields):
    return {"messages": [{"role": role, "content": content}], **fields}


def _mmc4(texts, *infos):
    return {"text_list": texts, "image_info": [{"image_name": n, "matched_text_index": k} for n, k in infos]}


def _coco(images, *annotations):
    annotations = [dict(zip(("id", "image_id", "caption"), a)) for a in annotations]
    return {"images": images, "annotations": annotations}


EDIT = _llava(("human", "<image>\nMake it blue."), ("gpt", "<image>"), images=["p/0.png", "p/1.png"])
GOOD = {
    "llava": _llava(("human", "<image>\nWhat is it?"), ("gpt", "A square."), image="p/0.png"),
    "chat": {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]},
    "text": {"text": "Once."},
    "interleaved": _mmc4(["One.", "Two."], ("p/0.png", 1)),
}


# ---- What each format gives ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [lambda rows: json.dumps(rows, indent=1).encode(), lambda rows: _lines(*rows)])
def test_llava(data, write):
    talk = [("human", "Compare <image>\n<image>\r\nNow."), ("gpt", "Same."), ("human", "Why?\n<image>")]
    rows = [
        GOOD["llava"],
        EDIT,
        _llava(("system", "Be brief."), *talk, image=["p/0.png", "p/0.png", "p/2.png"]),
        _llava(("human", "Hi.\nYou?"), ("gpt", "Hello."), image=None),
    ]
    source = _open(data, "llava", write(rows))
    found = [source[i] for i in range(4)]
    assert [list(r.images) for r in found] == [PNG[:1], PNG[:2], [PNG[0], PNG[0], PNG[2]], []]
    assert [list(r.messages) for r in found] == [
        [Message("user", [0, "What is it?"]), Message("assistant", ["A square."])],
        [Message("user", [0, "Make it blue."]), Message("assistant", [1])],
        [
            Message("system", ["Be brief."]),
            Message("user", ["Compare ", 0, 1, "Now."]),
            Message("assistant", ["Same."]),
            Message("user", ["Why?", 2]),
        ],
        [Message("user", ["Hi.\nYou?"]), Message("assistant", ["Hello."])],
    ]
    assert flatten(found[2])[0] == ["Be brief.", "Compare ", "Now.", "Same.", "Why?"]


def test_chat(data):
    parts = [
        {"type": "image", "image": "p/1.png"},
        {"type": "text", "text": "and"},
        {"type": "image"},
        {"type": "image_url", "image_url": {"url": INLINE}},
        {"type": "image_url", "image_url": {"url": "p/0.png"}},
    ]
    answer = {"role": "assistant", "content": [{"type": "image"}]}
    row = {"messages": [{"role": "system", "content": "Draw."}, {"role": "user", "content": parts}, answer]}
    source = _open(data, "chat", _lines(GOOD["chat"], {**row, "images": ["p/2.png", "p/0.png"]}))
    assert source[0].messages == [Message("user", ["Hi."]), Message("assistant", ["Hello."])]
    assert source[1].messages == [
        Message("system", ["Draw."]),
        Message("user", [0, "and", 1, 2, 3]),
        Message("assistant", [4]),
    ]
    assert source[1].images == [PNG[1], PNG[2], PNG[3], PNG[0], PNG[0]]
    flatten(source[1])


def test_placeholders_in_the_text_of_a_chat(data):
    """In a row with a list of images only, as in llava."""
    turns = [
        {"role": "user", "content": "Compare <image>\n<image>\nNow."},
        {"role": "assistant", "content": "<image>"},
        {"role": "user", "content": [{"type": "text", "text": "A <image> tag, and"}, {"type": "image"}]},
        {"role": "assistant", "content": "Yes."},
    ]
    paths = [f"p/{i}.png" for i in (2, 1, 0, 2)]
    source = _open(data, "chat", _lines({"messages": turns, "images": paths}, _chat("An <image> tag.")))
    assert source[0].messages == [
        Message("user", ["Compare ", 0, 1, "Now."]),
        Message("assistant", [2]),
        Message("user", ["A <image> tag, and", 3]),
        Message("assistant", ["Yes."]),
    ]
    assert source[0].images == [PNG[i] for i in (2, 1, 0, 2)]
    assert source[1].messages[0] == Message("user", ["An <image> tag."]) and not source[1].images
    llava = [("human", turns[0]["content"]), ("gpt", "<image>")]
    expected = source[0].messages[:2]
    assert _open(data, "llava", _lines(_llava(*llava, images=paths[:3])))[0].messages == expected


def test_text(data):
    source = _open(data, "text", b"\xef\xbb\xbf" + _lines({"text": " Grüße\n"}, b"  ", {"text": "two\nlines", "id": 3}))
    assert [source[i].text for i in range(len(source))] == ["Grüße", "two\nlines"]


def test_interleaved(data):
    rows = [
        _mmc4(["One.", "Two.", " "], ("1.png", 2), ("0.png", 0), ("2.png", 2)),
        {"images": [None, "0.png", None, "2.png"], "texts": ["A", None, "B", None], "metadata": None},
    ]
    source = _open(data, "interleaved", _lines(*rows), f",images={data}/p")
    assert source[0].content == [0, "One.", "Two.", 1, 2] and source[0].images == [PNG[0], PNG[1], PNG[2]]
    assert source[1].content == ["A", 0, "B", 1] and source[1].images == [PNG[0], PNG[2]]
    for record in source[0], source[1]:
        flatten(record)


def test_coco(data, caplog):
    images = [{"id": 7, "file_name": "1.png"}, {"id": "x", "file_name": "0.png"}, {"id": 9, "file_name": "2.png"}]
    captions = [(12, 7, "second "), (3, "x", "other"), (1, 7, "first"), (5, 7, " "), (4, 100, "whose?")]
    with caplog.at_level(logging.WARNING):
        source = _open(data, "coco", _coco(images, *captions), f",images={data / 'p'}")
    assert "ignored 1 annotations" in caplog.text
    assert source[0].captions == ["first", "second"] and source[0].images == [PNG[1]]
    assert source[1].captions == ["other"] and source[1].images == [PNG[0]]
    assert [source.key(i) for i in range(3)] == ["rows.json/7", "rows.json/x", "rows.json/9"]
    with pytest.raises(InvalidRecordError, match="it has no caption"):
        source[2]


# ---- Keys, splits, fingerprints --------------------------------------------------------------------------------------


def _many(kind, n=60):
    if kind != "coco":
        return _lines(*[GOOD[kind]] * n)
    return _coco([{"id": i, "file_name": "p/0.png"} for i in range(n)], *[(i, i, f"caption {i}") for i in range(n)])


@pytest.mark.parametrize("kind", [*GOOD, "coco"])
def test_keys_and_splits(data, kind, tmp_path_factory):
    source = _open(data, kind, _many(kind))
    keys = [source.key(i) for i in range(len(source))]
    assert len(set(keys)) == 60 and not any(str(data) in key or key.startswith("/") for key in keys)
    assert [source[i].key for i in range(3)] == keys[:3]
    path = next(data.glob("rows.*"))
    halves = [sources.open_source(f"{kind}:{path}", split, 0.4) for split in ("train", "test")]
    split = [[half.key(i) for i in range(len(half))] for half in halves]
    assert sorted(split[0] + split[1]) == sorted(keys) and min(map(len, split)) > 10
    moved = tmp_path_factory.mktemp("moved") / "new"
    data.rename(moved)
    again = sources.open_source(f"{kind}:{moved / path.name}", "test", 0.4)
    assert [again.key(i) for i in range(len(again))] == split[1]


def test_coco_keys_are_unique_without_unique_ids(data):
    images = [{"id": 1}, {"id": 1}, {"id": None}, 5, {"id": "1"}, {"id": True}, {"id": "\ud800"}, {"id": 2}]
    source = _open(data, "coco", _coco(images, (1, 1, "a"), (2, 2, "b")))
    assert len({source.key(i) for i in range(8)}) == 8 and source.key(7) == "rows.json/2"
    for i in range(7):
        with pytest.raises(InvalidRecordError, match=rf"^images\[{i}\]"):
            source[i]


@pytest.mark.parametrize("kind", ["llava", "chat", "interleaved", "coco"])
@pytest.mark.parametrize("sampled", [False, True])
def test_fingerprints(data, kind, sampled, monkeypatch):
    if sampled:
        monkeypatch.setattr(files, "FINGERPRINTED_ROWS", 10)
        monkeypatch.setattr(files, "HASHED_FILES", 5)
    user = _chat([{"type": "image", "image": "p/0.png"}, {"type": "image_url", "image_url": {"url": INLINE}}])
    odd = [
        _lines("no", user, _chat("x", images=["/etc/passwd", "../a"])),
        {"images": ["a\0", "../x"], "texts": [None] * 2},
    ]
    content = {"chat": _lines(*[user] * 30), "coco": _many("coco")}.get(kind) or _many(kind)
    source = _open(data, kind, content)
    before = source.fingerprint()
    assert source.fingerprint() == before
    (data / "p" / "0.png").write_bytes(PNG[3])
    changed = source.fingerprint()
    assert changed != before
    (data / "p" / "0.png").unlink()
    assert source.fingerprint() not in (before, changed)
    if kind in ("chat", "interleaved"):
        _open(data, kind, odd[0] if kind == "chat" else _lines(odd[1])).fingerprint()  # unusable rows do not stop it


def test_a_moved_data_set_keeps_its_fingerprint(data, tmp_path_factory):
    before = _open(data, "llava", _lines(GOOD["llava"], EDIT)).fingerprint()
    moved = tmp_path_factory.mktemp("moved") / "new"
    data.rename(moved)
    plain = sources.open_source(f"llava:{moved}/rows.jsonl", held_out=0.0)
    assert plain.fingerprint() == before
    plain.source.file.write_bytes(_lines(GOOD["llava"], GOOD["llava"]))
    assert plain.source.open(str(plain.source.file), "train").fingerprint() != before


# ---- Unusable rows ---------------------------------------------------------------------------------------------------

ASK, TELL = ("human", "<image>\nWhat?"), ("gpt", "That.")
PART = {"type": "image", "image": "p/0.png"}
BAD = {
    "not_json": ("llava", b'{"conversations": [', "row 2 is not JSON"),
    "not_utf8": ("text", b'{"text": "caf\xe9"}', "row 2 is not UTF-8 text"),
    "list_row": ("chat", [1], "row 2 is not a JSON object"),
    "deep": ("text", b'{"text": ' + b"[" * 100_000, "row 2 is not JSON"),
    "surrogate": ("text", {"text": "\ud83d"}, "its text is not Unicode text"),
    "no_text": ("text", {"txt": "a"}, "it has no text"),
    "blank_text": ("text", {"text": " \n"}, "it has no text"),
    "null_text": ("text", {"text": None}, "it has no text"),
    "text_number": ("text", {"text": 5}, "its text is int, not text"),
    "no_conversations": ("llava", {"id": 1, "image": "p/0.png"}, "its conversations are NoneType, not a list"),
    "conversations_object": ("llava", {"conversations": {"from": "human"}}, "its conversations are dict, not a list"),
    "conversations_empty": ("llava", {"conversations": []}, "its conversations are an empty list"),
    "turn_text": ("llava", {"conversations": ["hi"]}, "turn 1 of its conversations is str, not an object"),
    "unknown_from": ("llava", _llava(("user", "hi")), "turn 1 is from 'user'"),
    "from_list": ("llava", _llava((["human"], "hi")), "turn 1 is from list"),
    "gpt_first": ("llava", _llava(TELL), "turn 1 is from gpt, not human"),
    "human_twice": ("llava", _llava(("human", "a"), ("human", "b")), "turn 2 is from human, not gpt"),
    "late_system": ("llava", _llava(("human", "a"), ("system", "b")), "turn 2 is from system, not gpt"),
    "null_value": ("llava", _llava(("human", "a"), ("gpt", None)), "its value of turn 2 is NoneType, not text"),
    "empty_turn": ("llava", _llava(("human", "a"), ("gpt", " \n")), "turn 2 of its conversations is empty"),
    "no_placeholder": ("llava", _llava(("human", "a"), TELL, image="p/0.png"), "it has 1 image and no <image>"),
    "placeholder_only": ("llava", _llava(ASK, TELL), "it has 0 images and 1 <image>"),
    "counts_differ": ("llava", _llava(ASK, TELL, images=["p/0.png"] * 2), "it has 2 images and 1 <image>"),
    "both_names": ("llava", _llava(ASK, TELL, image="p/0.png", images=["p/0.png"]), "both image and images"),
    "image_number": ("llava", _llava(ASK, TELL, image=3), "its image is int, not a path or a list of paths"),
    "image_in_list": ("llava", _llava(ASK, TELL, image=[["p/0.png"]]), "its image is list; it must be a path"),
    "empty_path": ("llava", _llava(ASK, TELL, image=""), "its image is ''; it must be a path"),
    "missing_file": ("llava", _llava(ASK, TELL, image="p/9.png"), "its image p/9.png does not exist"),
    "directory": ("llava", _llava(ASK, TELL, image="p"), "its image p is not a file"),
    "absolute": ("llava", _llava(ASK, TELL, image="/etc/passwd"), "'/etc/passwd' is not a path inside"),
    "parent": ("llava", _llava(ASK, TELL, image="p/../../0.png"), "is not a path inside the data directory"),
    "surrogate_path": ("llava", _llava(ASK, TELL, image="\udcff.png"), "its image is not Unicode text"),
    "long_path": ("llava", _llava(ASK, TELL, image="a" * 10_000), "its image is not a path: it has 10000 characters"),
    "messages_text": ("chat", {"messages": "hi"}, "its messages are str, not a list"),
    "messages_empty": ("chat", {"messages": []}, "its messages are an empty list"),
    "message_list": ("chat", {"messages": [["user", "hi"]]}, "message 1 is list, not an object"),
    "role": ("chat", _chat("hi", role="tool"), "message 1 has the role 'tool'"),
    "content_null": ("chat", _chat(None), "its content of message 1 is NoneType, not text"),
    "content_empty": ("chat", _chat([]), "message 1 is empty"),
    "text_empty": ("chat", _chat([{"type": "text", "text": ""}]), "message 1 is empty"),
    "part_text": ("chat", _chat(["hi"]), "a part of message 1 is str, not an object"),
    "part_type": ("chat", _chat([{"type": "audio"}]), "a part of message 1 has the type 'audio'"),
    "part_null": ("chat", _chat([{"type": "text"}]), "its text in message 1 is NoneType, not text"),
    "url_text": ("chat", _chat([{"type": "image_url", "image_url": "p/0.png"}]), "is not an object with a url"),
    "http": (
        "chat",
        _chat([{"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}]),
        "nothing is downloaded: 'https://example.org/a.png'",
    ),
    "file_url": (
        "chat",
        _chat([{"type": "image", "image": "file:///a.png"}]),
        "nothing is downloaded: 'file:///a.png'",
    ),
    "base64": ("chat", _chat([{"type": "image", "image": "data:image/png;base64,a*b"}]), "its image is not base64"),
    "base64_umlaut": ("chat", _chat([{"type": "image", "image": "data:image/png;base64,äö"}]), "is not base64"),
    "base64_empty": ("chat", _chat([{"type": "image", "image": "data:image/png;base64,"}]), "a data URL without data"),
    "data_text": (
        "chat",
        _chat([{"type": "image", "image": "data:text/plain,hi"}]),
        "not a URL of the form data:image/",
    ),
    "images_unused": (
        "chat",
        _chat("hi", images=["p/0.png"]),
        "its list has 1 images, and 0 parts or <image> take one",
    ),
    "images_missing": (
        "chat",
        _chat([PART, {"type": "image"}]),
        "its list has 0 images, and 1 parts or <image> take one",
    ),
    "placeholders": (
        "chat",
        _chat("<image> <image>", images=["p/0.png"]),
        "its list has 1 images, and 2 parts or <image>",
    ),
    "images_text": ("chat", _chat("hi", images="p/0.png"), "its images are str, not a list"),
    "shape": ("interleaved", {"text": "a"}, "it has neither text_list and image_info nor images and texts"),
    "no_info": ("interleaved", {"text_list": ["a"]}, "its image_info is NoneType, not a list"),
    "info_text": ("interleaved", {"text_list": ["a"], "image_info": ["p"]}, "its image_info[0] is str, not an object"),
    "index_high": ("interleaved", _mmc4(["a"], ("p/0.png", 1)), "matched_text_index of its image_info[0] is 1, not"),
    "index_bool": ("interleaved", _mmc4(["a"], ("p/0.png", False)), "matched_text_index of its image_info[0] is False"),
    "name_null": ("interleaved", _mmc4(["a"], (None, 0)), "its image_info[0].image_name is NoneType, not text"),
    "null_in_list": ("interleaved", _mmc4(["a", None]), "its text_list[1] is NoneType, not text"),
    "nothing": ("interleaved", _mmc4([" "]), "it has no text and no image"),
    "lengths": ("interleaved", {"images": [None], "texts": ["a", "b"]}, "different lengths: 1 and 2"),
    "both_null": ("interleaved", {"images": [None], "texts": [None]}, "its images[0] and texts[0] are both null"),
    "both_given": ("interleaved", {"images": ["p/0.png"], "texts": ["a"]}, "its images[0] and texts[0] are both given"),
    "texts_null": ("interleaved", {"images": [], "texts": None}, "its texts is NoneType, not a list"),
    "not_image": ("interleaved", {"images": ["rows.jsonl"], "texts": [None]}, "not a readable image"),
}


@pytest.mark.parametrize("name", BAD)
def test_unusable_rows_say_why_and_are_skipped(data, name, caplog):
    kind, row, reason = BAD[name]
    source = _open(data, kind, _lines(GOOD[kind], row, GOOD[kind]))
    assert len(source) == 3 and source[2].key == "rows.jsonl/3"
    if name != "not_image":  # found when decoding
        with pytest.raises(InvalidRecordError) as error:
            source[1]
        assert reason in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 300
    with caplog.at_level(logging.WARNING):
        decoded = sources.DecodedDataset(source, 8)
        found = [decoded[i].record.key for i in range(3) for _ in range(2)]
    assert list(decoded.invalid) == [1] and reason in decoded.invalid[1]
    assert found == [f"rows.jsonl/{row}" for row in (1, 1, 3, 3, 3, 3)]
    assert [r.getMessage() for r in caplog.records] == [f"skipped rows.jsonl/2: {decoded.invalid[1]}"]


FILE = {"id": 2, "file_name": "p/1.png"}
BAD_COCO = {
    "not_object": ([2, "p/1.png"], [], "images[1] is list, not an object"),
    "no_id": ({"file_name": "p/1.png"}, [], "images[1] has no id of its own: None"),
    "no_caption": (FILE, [], "it has no caption"),
    "empty_caption": (FILE, [" \n"], "its caption is empty"),
    "null_caption": (FILE, ["fine", None], "its caption is NoneType, not text"),
    "no_file": ({"id": 2}, ["fine"], "its file_name is NoneType, not text"),
    "missing_file": ({"id": 2, "file_name": "p/9.png"}, ["fine"], "its image p/9.png does not exist"),
    "absolute": ({"id": 2, "file_name": "/p/1.png"}, ["fine"], "is not a path inside the data directory"),
    "parent": ({"id": 2, "file_name": "../1.png"}, ["fine"], "is not a path inside the data directory"),
    "url": ({"id": 2, "file_name": "http://example.org/1.png"}, ["fine"], "nothing is downloaded"),
}


@pytest.mark.parametrize("name", BAD_COCO)
def test_unusable_images_of_coco_say_why_and_are_skipped(data, name):
    image, captions, reason = BAD_COCO[name]
    images = [{"id": 1, "file_name": "p/0.png"}, image, {"id": 3, "file_name": "p/2.png"}]
    rows = [(1, 1, "one"), (2, 3, "three"), *((9, 2, caption) for caption in captions)]
    source = _open(data, "coco", _coco(images, *rows))
    with pytest.raises(InvalidRecordError) as error:
        source[1]
    assert reason in str(error.value)
    decoded = sources.DecodedDataset(source, 8)
    assert [decoded[i].record.captions for i in range(3)] == [["one"], ["three"], ["three"]]
    assert decoded.invalid == {1: str(error.value)}
    assert np.array_equal(decoded[0].pixels[0][0, 0], (10, 0, 0))


# ---- Unusable sources ------------------------------------------------------------------------------------------------

UNUSABLE = [
    *[(kind, None, "", "cannot be read (No such file or directory)") for kind in (*GOOD, "coco")],
    *[(kind, b"", "", "has no rows") for kind in GOOD],
    *[(kind, b" \n\n", "", "has no rows") for kind in GOOD],
    *[(kind, b"[]", "", "has no rows") for kind in GOOD],
    *[(kind, b'{"a": 1}', "", "is one JSON object") for kind in GOOD],
    *[(kind, b'{\n"messages": [],\n"text": []\n}', "", "is one JSON object") for kind in GOOD],
    *[(kind, b"[{}", "", "is not a JSON list or JSON Lines file") for kind in GOOD],
    *[(kind, b"[" * 100_000, "", "is not a JSON list or JSON Lines file") for kind in GOOD],
    ("llava", b'["caf\xe9"]', "", "is not a JSON list or JSON Lines file"),
    *[
        (kind, b"{}", ",colour=3", "has no option 'colour'; it has images")
        for kind in (*GOOD, "coco")
        if kind != "text"
    ],
    ("text", b"{}", ",images=p", "has no option 'images'; it has none"),
    ("llava", b"{}", ",images=", "needs one value for the option images"),
    ("llava", b"{}", ",images=p,images=q", "needs one value for the option images"),
    *[(kind, b"{}", ",images=/missing", "/missing of data source") for kind in (*GOOD, "coco") if kind != "text"],
    ("coco", b"", "", "is not JSON"),
    ("coco", b"\xff", "", "is not JSON"),
    ("coco", b"[" * 100_000, "", "is not JSON"),
    ("coco", b"[1]", "", "is not a COCO captions file"),
    ("coco", b'{"images": {}, "annotations": []}', "", "is not a COCO captions file"),
    ("coco", b'{"images": [], "annotations": []}', "", "has no images"),
]


@pytest.mark.parametrize("kind, content, options, reason", UNUSABLE, ids=range(len(UNUSABLE)))
def test_unusable_sources(data, kind, content, options, reason):
    if content is not None:
        (data / "rows").write_bytes(content)
    with pytest.raises(DataError) as error:
        sources.open_source(f"{kind}:{data}/rows{options}")
    assert type(error.value) is DataError and reason in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_paths_of_descriptions(data):
    for kind in (*GOOD, "coco"):
        with pytest.raises(DataError, match="names no file"):
            sources.open_source(f"{kind}:")
        with pytest.raises(DataError, match="Is a directory"):
            sources.open_source(f"{kind}:{data}")
    odd = data / "a,b=c"
    assert files.split_options("a,b,images=c,d", ("images",)) == ("a,b", {"images": "c,d"})
    odd.mkdir()
    with pytest.raises(DataError, match="has no option 'b'"):
        sources.open_source(f"text:{odd}/x.jsonl")
    (data / "rows.jsonl").write_bytes(_lines(GOOD["text"]))
    with pytest.raises(DataError, match="is a file; give its format, one of .*llava, chat, text, interleaved, coco"):
        sources.open_source(str(data / "rows.jsonl"))


def test_one_row_and_a_damaged_first_row_are_no_object(data):
    for kind, row in GOOD.items():
        assert len(_open(data, kind, _lines(row))) == 1
        assert len(_open(data, kind, _lines(b'{"a', row))) == 2
        assert len(_open(data, kind, _lines({"a": 1}, row))) == 2


def test_a_source_without_usable_rows_stops_with_the_reasons(data):
    source = _open(data, "llava", _lines(*[_llava(ASK, TELL)] * 3))
    with pytest.raises(DataError, match="no usable record among 3: 3 × it has 0 images and 1 <image>"):
        sources.DecodedDataset(source, 8)


def test_rows_that_disappear(data):
    source = _open(data, "text", _lines(GOOD["text"]))
    os.remove(source.source.file)
    with pytest.raises(InvalidRecordError, match="row 1 cannot be read"):
        source[0]
