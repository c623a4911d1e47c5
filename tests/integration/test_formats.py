"""The same images and texts, written in every format that can carry them, give the same rows, bit for bit."""

import io
import json
import signal
import subprocess
import tarfile

import jax
import numpy as np
import pytest
from helpers import ROOT, TEXT_VOCAB, link, main_command, tiny

from unimm_jax import checkpoint, metrics, objectives, text_tokenizer
from unimm_jax.data import pipeline, scenes, transforms
from unimm_jax.data.records import Records
from unimm_jax.data.sources import DecodedDataset, open_source
from unimm_jax.inference.loading import load_image_tokenizer
from unimm_jax.inference.pretokenization import Encoder, write_split
from unimm_jax.train import train


def _scenes(count):
    """(name, PNG bytes, caption, question, answer) of each scene."""
    for i in range(count):
        scene = scenes.draw_scene(0, "train", i)
        question, answer, _ = scenes.questions(scene)[2]
        image = transforms.encode_png(scenes.render(scene))
        yield f"{i:04d}", image, scenes.captions(scene)[0], question, answer


def _write_lines(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _write_images(folder, items):
    folder.mkdir()
    for name, image, *_ in items:
        (folder / f"{name}.png").write_bytes(image)


def _write_parquet(file, columns):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table(columns), file, row_group_size=16)


def _captions(root, items):
    """Sources of captions."""
    folder = root / "folder"
    _write_images(folder, items)
    with tarfile.open(root / "captions.tar", "w") as archive:
        for name, image, caption, *_ in items:
            (folder / f"{name}.txt").write_text(caption)
            for suffix, data in ((".png", image), (".txt", caption.encode())):
                member = tarfile.TarInfo(name + suffix)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    names, images, captions, *_ = zip(*items, strict=True)
    _write_parquet(root / "hub.parquet", dict(image=[dict(bytes=i, path=None) for i in images], text=list(captions)))
    _write_parquet(root / "img2dataset.parquet", dict(jpg=list(images), caption=list(captions)))
    coco = dict(
        images=[dict(id=i, file_name=f"{name}.png") for i, name in enumerate(names)],
        annotations=[dict(id=i, image_id=i, caption=caption) for i, caption in enumerate(captions)],
    )
    (root / "coco.json").write_text(json.dumps(coco))
    return [
        f"folder:{folder}",
        f"webdataset:{root}/captions.tar",
        f"parquet:{root}/hub.parquet",
        f"parquet:{root}/img2dataset.parquet",
        f"coco:{root}/coco.json,images={folder}",
    ]


def _conversations(root, items):
    """Sources of conversations about an image."""
    folder = root / "folder"
    llava, chat = [], []
    for name, _, _, question, answer in items:
        turns = [
            dict(zip(("from", "value"), t, strict=True)) for t in (("human", f"<image>\n{question}"), ("gpt", answer))
        ]
        llava.append(dict(id=name, image=f"{name}.png", conversations=turns))
        asked = [dict(type="image", image=f"{name}.png"), dict(type="text", text=question)]
        chat.append(dict(messages=[dict(role="user", content=asked), dict(role="assistant", content=answer)]))
    (root / "llava.json").write_text(json.dumps(llava))
    _write_lines(root / "llava.jsonl", llava)
    _write_lines(root / "chat.jsonl", chat)
    names = ("llava:{}/llava.json", "llava:{}/llava.jsonl", "chat:{}/chat.jsonl")
    return [f"{name.format(root)},images={folder}" for name in names]


def _interleaved(root, items):
    """Sources of interleaved documents: two images each, an image before its text."""
    mmc4, obelics = [], []
    for a, b in zip(items[::2], items[1::2], strict=True):
        shown = [dict(image_name=f"{item[0]}.png", matched_text_index=i) for i, item in enumerate((a, b))]
        mmc4.append(dict(text_list=[a[2], b[2]], image_info=shown))
        obelics.append(dict(images=[f"{a[0]}.png", None, f"{b[0]}.png", None], texts=[None, a[2], None, b[2]]))
    _write_lines(root / "mmc4.jsonl", mmc4)
    _write_lines(root / "obelics.jsonl", obelics)
    return [f"interleaved:{root}/{name}.jsonl,images={root / 'folder'}" for name in ("mmc4", "obelics")]


def _edits(root, items):
    """Sources of edits: each scene into the next one."""
    pairs = list(zip(items[::2], items[1::2], strict=True))
    rows = [dict(source=f"{a[0]}.png", target=f"{b[0]}.png", instruction=f"draw {b[2]}") for a, b in pairs]
    _write_lines(root / "folder" / "edits.jsonl", rows)
    columns = dict(
        input_image=[dict(bytes=a[1], path=None) for a, _ in pairs],
        edit_prompt=[row["instruction"] for row in rows],
        edited_image=[dict(bytes=b[1], path=None) for _, b in pairs],
    )
    _write_parquet(root / "edits.parquet", columns)
    return [f"edit:{root / 'folder'}", f"parquet:{root}/edits.parquet"]


KINDS = {
    "captions": (_captions, dict(caption=0.5, text_to_image=0.4, text=0.1)),
    "conversations": (_conversations, dict(conversation=1.0)),
    "interleaved": (_interleaved, dict(interleaved=1.0)),
    "edits": (_edits, dict(edit=1.0)),
}


def _check(run, root, count, steps):
    items = list(_scenes(count))
    encoder = Encoder(load_image_tokenizer(run / "tokenizer"), 32)
    words = text_tokenizer.train([text for item in items for text in item[2:]], TEXT_VOCAB)
    link(run, root, "tokenizer", "stage1")
    for kind, (write, tasks) in KINDS.items():
        found = []
        for i, description in enumerate(write(root, items)):
            dataset = DecodedDataset(open_source(description, held_out=0.0), 64)
            assert len(dataset) == count // (1 if kind in ("captions", "conversations") else 2), description
            records = root / f"{kind}_{i}"
            write_split(encoder, {0: dataset}, records, words, description)
            assert not dataset.invalid
            shares = {
                f"data__tasks__{name}": tasks.get(name, 0.0) for name in ("caption", "text_to_image", "text", *tasks)
            }
            config = tiny(
                "stage2",
                data__records=str(records),
                data__seq_len=96,
                train__steps=steps,
                init_from=(),
                evals={},
                **shares,
            )
            rows = pipeline.packed_input(config).rows
            assert Records(records).num_images == len(Records(records)) * len(dataset[0].pixels)
            losses = []
            if steps > 1:
                train(config, root / f"run_{kind}_{i}")
                losses = [row["loss"] for row in metrics.read(root / f"run_{kind}_{i}")]
                assert len(losses) == steps
            places = [(step, row) for step in range(3) for row in range(rows.size(step, 1))]
            found.append(([rows.row(*place) for place in places], losses, description))
        first, losses, description = found[0]
        assert any(row["segments"].any() for row in first)
        for others, other_losses, name in found[1:]:
            for a, b in zip(first, others, strict=True):
                assert all(a[key].tobytes() == b[key].tobytes() for key in a), (description, name)
            assert losses == other_losses


def test_every_format_gives_the_same_rows(run, tmp_path):
    _check(run, tmp_path / "all", 40, 1)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_format_gives_the_same_rows_and_losses_at_600_scenes(run, tmp_path):
    """Five minutes: 600 scenes and 20 steps for each of 12 sources."""
    _check(run, tmp_path / "all", 600, 20)


def _sources(root, count):
    """Every source, with the scenes written in its format."""
    root.mkdir()
    items = list(_scenes(count))
    return [description for write, _ in KINDS.values() for description in write(root, items)]


def test_every_format_is_read_in_the_same_order_by_any_number_of_processes(tmp_path):
    """The shares of 1, 2 and 4 processes put together are the global batch."""
    for description in _sources(tmp_path / "all", 24):
        config = tiny("tokenizer", data__sources=description, data__held_out=0.0)
        data = objectives.get(config.objective).open_input(config)
        for index in (0, 5):
            whole = data.batch(index)
            for count in (1, 2, 4):
                shares = [lambda size, i=i, n=count: np.arange(size).reshape(n, -1)[i] for i in range(count)]
                parts = [data.batch(index, share) for share in shares]
                found = np.concatenate([part["images"] for part in parts])
                assert found.tobytes() == whole["images"].tobytes(), (description, count)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_format_resumes_to_the_same_bits_after_sigkill(run, tmp_path):
    """Five minutes: the tokenizer stage reads each of 12 sources, is killed at an arbitrary step and resumes."""
    link(run, tmp_path, "selector")
    for number, description in enumerate(_sources(tmp_path / "all", 40)):
        changes = dict(data__sources=description, train__steps=48, train__checkpoint_every=4)
        whole, broken = tmp_path / f"whole_{number}", tmp_path / f"broken_{number}"
        train(tiny("tokenizer", **changes), whole)
        command = main_command("tokenizer", broken, **changes)
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            done = line.split("/48")[0].split()
            saved = (broken / "checkpoints" / "4").exists()  # checkpoints are written while training goes on
            if saved and line.startswith("tokenizer") and done[-1].isdigit() and int(done[-1]) >= 6 + number % 5:
                process.send_signal(signal.SIGKILL)
                break
        process.wait()
        assert not (broken / "done.json").exists(), description
        finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert finished.returncode == 0 and "resumes from step" in finished.stdout, finished.stdout + finished.stderr
        a, b = (jax.tree.leaves(checkpoint.read_params(workdir)) for workdir in (whole, broken))
        assert all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in zip(a, b, strict=True)), description
        losses = [[row["loss"] for row in metrics.read(workdir)] for workdir in (whole, broken)]
        assert losses[0] == losses[1] and len(losses[0]) == 48, description


def test_rows_hold_images_that_are_read_and_written(run, tmp_path):
    """An edit reads one image and writes another; the row's image slots hold those that are read."""
    items = list(_scenes(8))
    _write_images(tmp_path / "folder", items)
    dataset = DecodedDataset(open_source(_edits(tmp_path, items)[0], held_out=0.0), 64)
    words = text_tokenizer.train([item[2] for item in items], TEXT_VOCAB)
    encoder = Encoder(load_image_tokenizer(run / "tokenizer"), 8)
    write_split(encoder, {0: dataset}, tmp_path / "records", words, "edits")
    config = tiny(
        "stage2", data__records=str(tmp_path / "records"), data__seq_len=96, data__prompt_dropout=0.0,
        data__tasks__edit=1.0, data__tasks__caption=0.0, data__tasks__text_to_image=0.0, data__tasks__text=0.0,
    )  # fmt: skip
    data = pipeline.packed_input(config)
    assert data.vocabulary is not None and "edit 100.0%" in data.notes()[0]
    row, examples = data.rows.row(0, 0), data.rows.plan.rows(0)[0]
    for segment, example in enumerate(examples, 1):
        inside = row["segments"] == segment
        assert np.array_equal(row["images"][segment - 1], dataset[example.record].pixels[0])
        is_code = (row["tokens"] >= data.vocabulary.first_code) & (row["tokens"] < data.vocabulary.first_position)
        written = data.vocabulary.read_image(
            row["tokens"][inside & is_code | inside & (row["tokens"] >= data.vocabulary.first_position)], 16
        )
        assert written[1].sum() > 0
        assert (row["weights"][inside][:-1] > 0).sum() > written[1].sum()  # codes, their positions, [/IMG] and </s>
