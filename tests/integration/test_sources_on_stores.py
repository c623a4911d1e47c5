"""Every format of data sources on object stores, compared with the same files on a local disk."""

import concurrent.futures
import dataclasses
import errno
import io
import json
import pickle
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import faults, put, write_tfds

from unimm_jax import storage
from unimm_jax.data import pipeline, sources
from unimm_jax.data.sources import DecodedDataset, files, webdataset
from unimm_jax.data.transforms import encode_png
from unimm_jax.errors import DataError, InvalidRecordError, StorageError

COUNT = 5
PNG = [encode_png(np.full((8, 8, 3), 40 * i, np.uint8)) for i in range(COUNT)]
CAPTIONS = [f"Image number {i}." for i in range(COUNT)]


def write_tar(file, numbers):
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for i in numbers:
            for name, data in ((f"{i:03}.txt", CAPTIONS[i].encode()), (f"{i:03}.png", PNG[i])):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def write_parquet(file, numbers):
    file.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": PNG[i], "path": f"{i}.png"} for i in numbers]
    pq.write_table(pa.table({"image": images, "text": [CAPTIONS[i] for i in numbers]}), file, row_group_size=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A directory with every format."""
    root = tmp_path_factory.mktemp("data")
    (root / "images" / "more").mkdir(parents=True)
    names = [f"{'more/' if i % 2 else ''}{i}.png" for i in range(COUNT)]
    for name, png, caption in zip(names, PNG, CAPTIONS, strict=True):
        (root / "images" / name).write_bytes(png)
        (root / "images" / name).with_suffix(".txt").write_text(caption)
    write_tar(root / "tars" / "a.tar", (0, 1))
    write_tar(root / "tars" / "b.tar", (2, 3, 4))
    write_parquet(root / "parquet" / "a.parquet", (0, 1, 2))
    write_parquet(root / "parquet" / "more" / "b.parquet", (3, 4))
    turns = [[{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": c}] for c in CAPTIONS]
    part = lambda name: {"type": "image", "image": name}
    rows = {
        "llava": [{"image": n, "conversations": t} for n, t in zip(names, turns)],
        "chat": [{"messages": [{"role": "user", "content": [part(n)]}, {"role": "assistant", "content": c}]}
                 for n, c in zip(names, CAPTIONS)],
        "interleaved": [{"images": [n, None], "texts": [None, c]} for n, c in zip(names, CAPTIONS)],
        "text": [{"text": c} for c in CAPTIONS],
    }  # fmt: skip
    for kind, found in rows.items():
        (root / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    (root / "llava.json").write_text(json.dumps(rows["llava"]))
    edits = [{"source": n, "target": names[0], "instruction": "make it black"} for n in names]
    (root / "images" / "edits.jsonl").write_text("\n".join(map(json.dumps, edits)))
    annotations = [{"id": i, "image_id": i, "caption": c} for i, c in enumerate(CAPTIONS)]
    images = [{"id": i, "file_name": n} for i, n in enumerate(names)]
    (root / "coco.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    write_tfds(root / "tfds", zip(PNG, CAPTIONS, strict=True))
    return root


@pytest.fixture(scope="module")
def on_gs(bucket, data):
    put(data, f"{bucket}/data")
    return f"{bucket}/data"


@pytest.fixture(scope="module")
def on_s3(s3_bucket, data):
    put(data, f"{s3_bucket}/data")
    return f"{s3_bucket}/data"


FORMATS = (
    "folder:ROOT/images", "webdataset:ROOT/tars", "webdataset:ROOT/tars/{a,b}.tar", "webdataset:ROOT/tars/[ab].tar",
    "webdataset:ROOT/**/*.tar", "parquet:ROOT/parquet", "parquet:ROOT/parquet/*.parquet",
    "coco:ROOT/coco.json,images=ROOT/images", "llava:ROOT/llava.json,images=ROOT/images",
    "llava:ROOT/llava.jsonl,images=ROOT/images", "chat:ROOT/chat.jsonl,images=ROOT/images",
    "interleaved:ROOT/interleaved.jsonl,images=ROOT/images", "edit:ROOT/images", "text:ROOT/text.jsonl",
    "tfds:ROOT/tfds/made/1.0.0", "ROOT/tars", "ROOT/parquet", "ROOT/images", "ROOT/tfds/made/1.0.0",
)  # fmt: skip


@pytest.mark.parametrize("description", FORMATS)
def test_a_source_on_gs_gives_the_local_records(data, on_gs, description):
    compare(data, on_gs, description)


@pytest.mark.parametrize("number", [0, 2, 3, 6, 9, 14])  # one of each way to read
def test_a_source_on_s3_gives_the_local_records(data, on_s3, number):
    compare(data, on_s3, FORMATS[number])


def compare(data, store, description):
    local, remote = (
        sources.open_source(description.replace("ROOT", str(root)), held_out=0.0) for root in (data, store)
    )
    assert len(local) == len(remote) >= 3
    assert [local.key(i) for i in range(len(local))] == [remote.key(i) for i in range(len(remote))]
    for source in (remote, pickle.loads(pickle.dumps(remote))):
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            for one, other in zip(map(local.__getitem__, range(len(local))), pool.map(source.__getitem__, range(99))):
                assert dataclasses.asdict(one) == dataclasses.asdict(other)
    assert remote.fingerprint() == sources.open_source(description.replace("ROOT", store)).fingerprint()


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ("ROOT/none", "neither an existing directory"),
        ("ROOT/text.jsonl", "is a file; give its format"),
        ("folder:ROOT/none", "is not a directory"),
        ("folder:ROOT/tars", "holds no images"),
        ("webdataset:ROOT/{a,b,none}.tar", "names 3 files that do not exist; the first is ROOT/a.tar"),
        ("webdataset:ROOT/none*.tar", "matches no file"),
        ("parquet:ROOT/tars/a.tar", "not a whole Parquet file"),
        ("llava:ROOT/none.json", "none.json cannot be read (No such file or directory)"),
        ("coco:ROOT/none.json", "none.json cannot be read (No such file or directory)"),
        ("coco:ROOT/coco.json,images=ROOT/none", "is not a directory"),
        ("tfds:ROOT/tars", "no dataset_info.json"),
    ],
)
def test_what_is_missing_on_a_store_is_one_line(on_gs, description, message):
    with pytest.raises(DataError) as error:
        sources.open_source(description.replace("ROOT", on_gs))
    assert message.replace("ROOT", on_gs) in str(error.value) and "\n" not in str(error.value)


def test_a_missing_image_is_an_invalid_record_and_a_refusal_is_not(data, bucket):
    put(data, f"{bucket}/missing")
    storage.write_whole(storage.path(f"{bucket}/missing/rows.jsonl"), (data / "llava.jsonl").read_bytes())
    source = sources.open_source(f"llava:{bucket}/missing/rows.jsonl", held_out=0.0)
    with pytest.raises(InvalidRecordError, match=r"its image 0\.png does not exist"):
        source[0]
    source = sources.open_source(f"folder:{bucket}/missing/images", held_out=0.0)
    faults(forbid="1.png")
    try:
        assert source[0].captions == [CAPTIONS[0]]
        with pytest.raises(StorageError, match="refuses or cannot be reached"):
            for i in range(len(source)):
                source[i]
    finally:
        faults()


def test_a_record_is_one_request_and_an_index_is_built_once(data, bucket, monkeypatch):
    put(data / "tars", f"{bucket}/once")
    description = f"webdataset:{bucket}/once"
    sources.open_source(description)
    assert {"a.tar.index.npz", "b.tar.index.npz"} <= set(storage.files_under(storage.path(f"{bucket}/once")))
    monkeypatch.setattr(webdataset, "_build_index", None)  # read from beside the tars
    source = sources.open_source(description, held_out=0.0)
    before = faults()["requests"]
    for i in range(COUNT):
        source[i]
    assert faults()["requests"] - before == COUNT
    put(data / "parquet", f"{bucket}/once/parquet")
    source = sources.open_source(f"parquet:{bucket}/once/parquet", held_out=0.0)
    before = faults()["requests"]
    for i in range(COUNT):
        source[i]
    assert faults()["requests"] - before <= 2 * 3  # 3 row groups and their footers


def test_a_tar_in_a_bucket_that_is_not_writable_has_its_index_in_the_cache(data, bucket, monkeypatch):
    for name in ("a.tar", "b.tar"):
        storage.write_whole(storage.path(f"{bucket}/read_only/{name}"), (data / "tars" / name).read_bytes())
    faults(forbid="upload")
    try:
        sources.open_source(f"webdataset:{bucket}/read_only")
        monkeypatch.setattr(webdataset, "_build_index", None)
        assert len(sources.open_source(f"webdataset:{bucket}/read_only", held_out=0.0)) == COUNT
    finally:
        faults()
    assert storage.files_under(storage.path(f"{bucket}/read_only")) == ["a.tar", "b.tar"]


def test_batches_from_a_store_are_the_local_ones(data, on_gs):
    batches = []
    for root in (data, on_gs):
        datasets = [DecodedDataset(sources.open_source(f"webdataset:{root}/tars", held_out=0.0), 8)]
        rows = pipeline.ImageRows(datasets, 0, 4, 6, lambda item, _: {"images": item.pixels[0]})
        assert rows.is_remote == (root is on_gs)
        batches.append([batch["images"] for batch in pipeline.Input(rows).iterate()])
    assert len(batches[0]) == 6 and np.array_equal(*batches)


def test_rows_of_a_large_file_are_read_one_by_one(data, bucket, monkeypatch):
    monkeypatch.setattr(files, "COPIED_BYTES", 10)
    target = storage.path(f"{bucket}/large/text.jsonl")
    storage.write_whole(target, (data / "text.jsonl").read_bytes())
    for _ in range(2):
        rows = files.JsonRows(target)
        assert [rows[i] for i in range(len(rows))] == [{"text": caption} for caption in CAPTIONS]
        monkeypatch.setattr(files, "_line_starts", None)  # in the cache
    assert not list(storage.cache_folder().glob("*/text.jsonl.*.jsonl"))


def test_a_copy_that_the_cache_has_removed_is_fetched_again(on_gs):
    rows = files.JsonRows(storage.path(f"{on_gs}/text.jsonl"))
    rows._copy.unlink()
    assert rows[1] == {"text": CAPTIONS[1]}


def test_a_full_local_disk_is_not_taken_for_a_damaged_row(on_gs, monkeypatch):
    rows = files.JsonRows(storage.path(f"{on_gs}/text.jsonl"))

    def fill(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    rows._copy.unlink()
    monkeypatch.setattr(storage, "local_file", fill)
    with pytest.raises(OSError, match="No space left"):
        rows[1]
