import concurrent.futures
import gzip
import io
import json
import logging
import os
import pathlib
import pickle
import re
import struct
import tarfile
import time
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from unimm_jax.data import recent, sources
from unimm_jax.data.outlines import flatten
from unimm_jax.data.sources import parquet, shards, webdataset
from unimm_jax.errors import DataError, InvalidRecordError


def _png(red, size=(12, 10)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (red, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def _chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


PNG = [_png(red) for red in (10, 60, 110, 160)]


def _declares(side):
    """A PNG that declares side × side pixels."""
    parts = (b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"0" * 99))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*part) for part in parts)


BOMB, LARGE = _declares(60_000), _declares(9_500)  # Pillow refuses the first, `decode_image` also the second


def _tar(file, *members, format=tarfile.GNU_FORMAT):
    """Writes members (name, contents); contents None is a directory."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.type = tarfile.DIRTYPE if data is None else tarfile.REGTYPE
            info.size = len(data or b"")
            tar.addfile(info, io.BytesIO(data or b""))
    return file


def _samples(n, start=0, size=0):
    """Members of n samples."""
    pairs = ((f"{i:05}.png", PNG[i % 4] + b"\0" * size, f"{i:05}.txt", b"Number %d." % i) for i in range(start, n))
    return [member for a, b, c, d in pairs for member in ((a, b), (c, d))]


def _open(description, **options):
    return sources.open_source(str(description), held_out=0.0, **options)


def _decode(source):
    return sources.DecodedDataset(source, 8)


def _bytes_read(function):
    """Bytes that a call reads from files, at least one time of three: other threads may read too."""
    found = []
    for _ in range(3):
        before = int(re.search(r"rchar: (\d+)", pathlib.Path("/proc/self/io").read_text())[1])
        own = len(pathlib.Path("/proc/self/io").read_bytes())
        function()
        found.append(int(re.search(r"rchar: (\d+)", pathlib.Path("/proc/self/io").read_text())[1]) - before - 2 * own)
    return min(found)


needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="counts bytes with /proc/self/io")


# ---- Tars ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_round_trip(tmp_path, format):
    deep = "/".join(["directory-with-a-name"] * 6)  # 131 characters; ustar splits at a slash
    assert len(deep) > 100
    wide = ("n" * 120 if format != tarfile.USTAR_FORMAT else "n" * 90) + "-é"
    info = {"caption": "A json.", "url": "https://example.org", "width": 12}
    members = [
        (".", None),
        ("./a.PNG", PNG[0]),
        ("./a.txt", "\ufeff One\ncaption. ".encode()),
        ("b", None),
        ("b/a.jpg", PNG[1]),  # the same base name in another directory
        ("b/a.json", json.dumps(info).encode()),
        (f"{deep}/c.d.png", b"another part"),  # the part d.png of the sample c, which is ignored
        (f"{deep}/c.webp", PNG[2]),
        (f"{deep}/c.json", json.dumps({"captions": ["One.", " ", "Two. "]}).encode()),
        (f"{wide}.txt", b"Text wins."),
        ("z.txt", b"Last."),
        ("z.json", json.dumps(info).encode()),
        (f"{wide}.json", json.dumps(info).encode()),
        (f"{wide}.jpeg", PNG[3]),  # not beside its caption
        ("z.png", PNG[0]),
        ("._z.png", b"of another system"),
        ("z.cls", b"7"),
    ]
    _tar(tmp_path / "x.tar", *members, format=format)
    for name in ("x.tar", "", "*.tar", "{x,x}.tar"):  # also from the stored index
        source = _open(f"webdataset:{tmp_path / name}")
        found = [source[i] for i in range(len(source))]
        assert [(r.key, list(r.images), r.captions) for r in found] == [
            ("x.tar/a", PNG[:1], ["One\ncaption."]),
            ("x.tar/b/a", PNG[1:2], ["A json."]),
            (f"x.tar/{deep}/c", PNG[2:3], ["One.", "Two."]),
            (f"x.tar/{wide}", PNG[3:], ["Text wins."]),
            ("x.tar/z", PNG[:1], ["Last."]),
        ]
        assert [source.key(i) for i in range(5)] == [r.key for r in found]
        for record in found:
            flatten(record)
    assert sources.detect(str(tmp_path)) == "webdataset"
    with pytest.raises(IndexError):
        source.source[5]


def test_tar_sizes_and_names_in_other_forms(tmp_path):
    """A PAX size, a size as a binary number, a global header, links, and a member that is there twice."""
    file = tmp_path / "x.tar"
    with tarfile.open(file, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "of the archive"}) as tar:
        for name, data, headers in [
            ("a.png", PNG[0], {}),
            ("a.txt", b"Old.", {"path": "a.txt", "size": "4"}),
            ("a.txt", b"New.", {"path": "a.txt", "mtime": "1.5"}),
        ]:
            info = tarfile.TarInfo(name if not headers else "other")
            info.size, info.pax_headers = len(data), headers
            tar.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("b.png")
        link.type, link.linkname = tarfile.SYMTYPE, "a.png"
        tar.addfile(link)
    data = bytearray(file.read_bytes())
    at = data.index(b"other\0", data.index(b"New.") - 1024)  # the last header
    data[at + 124 : at + 136] = b"\x80" + (4).to_bytes(11, "big")
    header = data[at : at + 512]
    header[148:156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(header)
    file.write_bytes(data)
    source = _open(f"webdataset:{file}")
    assert [(r.key, r.captions) for r in [source[0]]] == [("x.tar/a", ["New."])] and len(source) == 1


def test_tar_patterns(tmp_path):
    for i in (8, 9, 10):
        _tar(tmp_path / "s" / f"{i:03}.tar", *_samples(i + 1, i))
    _tar(tmp_path / "t" / "deep" / "008.tar", *_samples(21, 20))
    opened = lambda name: [s.key(i) for s in [_open(f"webdataset:{tmp_path}/{name}")] for i in range(len(s))]
    assert opened("s/{008..010}.tar") == ["008.tar/00008", "009.tar/00009", "010.tar/00010"]
    assert opened("s/0{08,10}.tar") == ["008.tar/00008", "010.tar/00010"]
    assert opened("s/00?.tar") == opened("s/{008..009}.tar") == opened("s/00{8..9}.tar")
    assert opened("{s,t/deep}/008.tar") == ["s/008.tar/00008", "t/deep/008.tar/00020"]
    assert opened("**/008.tar") == ["s/008.tar/00008", "t/deep/008.tar/00020"]
    assert opened("") == [*(f"s/{i:03}.tar/{i:05}" for i in (8, 9, 10)), "t/deep/008.tar/00020"]
    (tmp_path / "[s]{1,2}").mkdir()
    _tar(tmp_path / "[s]{1,2}" / "a.tar", *_samples(1))  # what exists is no pattern
    assert opened("[s]{1,2}/a.tar") == opened("[s]{1,2}") == ["a.tar/00000"]
    assert list(shards.expand_braces("{1..3}-{09..10}")) == ["1-09", "1-10", "2-09", "2-10", "3-09", "3-10"]
    for name, reason in [
        ("s/{008..012}.tar", "names 2 files that do not exist; the first is .*011.tar"),
        ("s/{9..8}.tar", "matches no file"),
        ("u/*.tar", "matches no file"),
        ("u/x.tar", "names 1 files that do not exist"),
        ("{0..99999999}.tar", "names more than"),
    ]:
        with pytest.raises(DataError, match=reason) as error:
            opened(name)
        assert "\n" not in str(error.value)


def test_tar_index_is_stored_and_refreshed(tmp_path, monkeypatch):
    file = _tar(tmp_path / "x.tar", *_samples(3))
    built = []
    build = webdataset._build_index
    monkeypatch.setattr(webdataset, "_build_index", lambda *a: built.append(a[2].name) or build(*a))
    keys = lambda: [s.key(i) for s in [_open(f"webdataset:{tmp_path}")] for i in range(len(s))]
    first = keys()
    assert keys() == first and built == ["x.tar"]
    assert sorted(f.name for f in tmp_path.iterdir()) == ["x.tar", "x.tar.index.npz"]
    _tar(file, *_samples(4))  # another size
    assert len(keys()) == 4 and len(built) == 2
    _tar(file, *_samples(5, 1))
    os.utime(file, ns=(1, 2))  # the same size and another time
    assert keys() == [f"x.tar/{i:05}" for i in (1, 2, 3, 4)] and len(built) == 3
    assert len(keys()) == 4 and len(built) == 3
    stored = tmp_path / "x.tar.index.npz"
    whole = stored.read_bytes()
    buffer = io.BytesIO()
    np.save(buffer, np.arange(3))
    for number, damaged in enumerate([b"", whole[:-40], whole[:300], b"no zip", buffer.getvalue()], 4):
        stored.write_bytes(damaged)
        assert len(keys()) == 4 and len(built) == number
    assert stored.read_bytes()[:2] == b"PK"


def test_tar_in_a_directory_that_is_not_writable(tmp_path, tmp_path_factory, monkeypatch):
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("UNIMM_CACHE_DIR", str(cache))
    _tar(tmp_path / "x.tar", *_samples(3))
    (tmp_path / "x.tar.index.npz").mkdir()  # root may write anywhere, but cannot replace a directory by a file
    for _ in range(2):
        assert len(_open(f"webdataset:{tmp_path}")) == 3
        assert sorted(f.name for f in tmp_path.iterdir()) == ["x.tar", "x.tar.index.npz"]
        assert [f.name for f in cache.glob("*/*")] == ["x.tar.index.npz"]  # in the cache instead
        monkeypatch.setattr(webdataset, "_build_index", None)  # and read from there
    monkeypatch.undo()
    monkeypatch.setenv("UNIMM_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
    (tmp_path / "x.tar.index.npz").rmdir()
    os.chmod(tmp_path, 0o500)
    opened = pathlib.Path.open

    def refuse(self, mode="r", *args, **options):
        if "r" not in mode:
            raise PermissionError(13, "Permission denied")
        return opened(self, mode, *args, **options)

    monkeypatch.setattr(pathlib.Path, "open", refuse)
    try:
        source = _open(f"webdataset:{tmp_path}")
        assert source[2].captions == ["Number 2."] and os.listdir(tmp_path) == ["x.tar"]
    finally:
        os.chmod(tmp_path, 0o700)


@needs_proc
def test_tar_record_reads_only_its_members(tmp_path):
    _tar(tmp_path / "x.tar", *_samples(50, size=20_000))
    source = _open(f"webdataset:{tmp_path}")
    for index in (0, 17, 49):
        record = source[index]
        size = sum(map(len, record.images)) + len(record.captions[0])
        assert size <= _bytes_read(lambda: source[index]) <= 2 * size  # noqa: B023
    # of the tar itself, the first pass reads the headers
    (tmp_path / "x.tar.index.npz").unlink()
    with webdataset.Tar(tmp_path / "x.tar") as tar:
        total = (tmp_path / "x.tar").stat().st_size
        assert _bytes_read(lambda: list(webdataset.members(tar, total))) <= 512 * (2 * 50 + 1)


def _bad_samples():
    txt = lambda name: (f"{name}.txt", b"A caption.")
    png = lambda name, data=PNG[0]: (f"{name}.png", data)
    info = lambda name, value: (f"{name}.json", value if isinstance(value, bytes) else json.dumps(value).encode())
    return {
        "it has no caption": [png("x")],
        "it has no image": [txt("x")],
        "it has several images": [png("x"), ("x.jpg", PNG[1]), txt("x")],
        "its caption is empty": [png("x"), ("x.txt", b" \n ")],
        "its .txt is empty": [png("x"), ("x.txt", b"")],
        "its caption is not UTF-8 text": [png("x"), ("x.txt", b"caf\xe9")],
        "its image is empty": [png("x", b""), txt("x")],
        "not a readable image": [png("x", PNG[0][:40]), txt("x")],
        "too large or too elongated": [png("x", LARGE), txt("x")],
        "not a readable image: Image size (3600000000 pixels)": [png("x", BOMB), txt("x")],
        "its .json is not JSON": [png("x"), info("x", b'{"caption": ')],
        "its .json is not UTF-8": [png("x"), info("x", b'{"caption": "\xff"}')],
        "its .json is list, not an object": [png("x"), info("x", ["A caption."])],
        "its .json has no caption or captions or text": [png("x"), info("x", {"caption": None, "url": "u"})],
        "its caption is int, not text": [png("x"), info("x", {"caption": 7})],
        "its captions is NoneType, not text": [png("x"), info("x", {"captions": ["A.", None]})],
        "its captions is empty": [png("x"), info("x", {"captions": []})],
        "its text is dict, not text": [png("x"), info("x", {"text": {"en": "A."}})],
        "its caption is not Unicode text": [png("x"), info("x", b'{"caption": "\\ud800"}')],
        "its .json has conversations": [png("x"), info("x", {"conversations": [], "caption": "A."})],
    }


@pytest.mark.parametrize("reason", _bad_samples())
def test_malformed_samples_are_counted(tmp_path, reason):
    _tar(tmp_path / "x.tar", *_bad_samples()[reason], *_samples(3))
    data = _decode(_open(f"webdataset:{tmp_path}"))
    found = [data[i].record.key for i in range(4)]
    assert found == ["x.tar/00000", "x.tar/00000", "x.tar/00001", "x.tar/00002"]
    assert list(data.invalid) == [0] and data.invalid[0].startswith(reason)


def test_deep_json(tmp_path):
    _tar(tmp_path / "x.tar", ("x.png", PNG[0]), ("x.json", b"[" * 200_000), *_samples(1))
    data = _decode(_open(f"webdataset:{tmp_path}"))
    assert data[0].record.key == "x.tar/00000" and data.invalid[0].startswith("its .json is not JSON")


def test_truncated_tars(tmp_path, caplog):
    whole = _tar(tmp_path / "all" / "x.tar", *_samples(3)).read_bytes()
    with tarfile.open(tmp_path / "all" / "x.tar") as tar:
        headers = {m.name: (m.offset, m.offset_data) for m in tar}
    cut = headers["00001.png"]
    cases = [  # end of the file, samples, damaged at, reason of the last sample
        (cut[1] + 20, 2, cut[0], "it has no caption"),
        (headers["00001.txt"][1] + 4, 2, headers["00001.txt"][0], "its .txt is cut off"),
        (cut[0] + 100, 1, cut[0], None),
        (cut[0], 1, cut[0], None),
    ]
    for number, (end, samples, at, reason) in enumerate(cases):
        file = tmp_path / str(number) / "x.tar"
        file.parent.mkdir()
        file.write_bytes(whole[:end])
        for _ in range(2):  # also from the stored index
            caplog.clear()
            source = _open(f"webdataset:{file}")
            warned = [r.getMessage() for r in caplog.records if "damaged" in r.getMessage()]
            assert len(warned) == 1 and f"{file} is damaged at byte {at} (" in warned[0]
        data = _decode(source)
        assert len(source) == samples and data[0].record.captions == ["Number 0."]
        if reason:
            assert data.load(1) is None and data.invalid[1].startswith(reason)
    # a header in the middle
    file.write_bytes(whole[: cut[0]] + b"\xff" * 512 + whole[cut[0] + 512 :])
    caplog.clear()
    assert len(_open(f"webdataset:{file}")) == 1
    assert f"damaged at byte {cut[0]} (no header of a tar)" in caplog.text


def _with_size(field):
    """A tar whose member declares a size that it does not have."""
    header = bytearray(tarfile.TarInfo("a.png").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = field
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + b"\0" * 1024


@pytest.mark.parametrize(
    ("field", "reason"),
    [
        (b"\x80" + b"\xff" * 11, "its image has more than"),
        (b"\xff" * 11 + b"\0", "damaged at byte 0"),
        (b"-0000000777\0", "damaged at byte 0"),
        (b"eighty bytes", "damaged at byte 0"),
        (b"77777777777\0", "its image has more than"),
        (b"00000040000\0", "its image is cut off"),
    ],
)
def test_sizes_that_are_wrong(tmp_path, field, reason):
    text = _tar(tmp_path / "y.tar", ("a.txt", b"A caption.")).read_bytes()[:1024]
    (tmp_path / "x.tar").write_bytes(text + _with_size(field))
    (tmp_path / "y.tar").unlink()
    if reason.startswith("damaged"):
        (tmp_path / "x.tar").write_bytes(_with_size(field))
        with pytest.raises(DataError, match=reason):
            _open(f"webdataset:{tmp_path}")
    else:
        with pytest.raises(InvalidRecordError, match=reason):
            _open(f"webdataset:{tmp_path}")[0]


@pytest.mark.parametrize("records", [b"99 path=a\n", b"-3 path=a\n", b"x", b"0 =\n", b"9 size=-1\n"])
def test_damaged_pax_records(tmp_path, records):
    info = tarfile.TarInfo("PaxHeader")
    info.type, info.size = b"x", len(records)
    block = info.tobuf(tarfile.USTAR_FORMAT) + records.ljust(512, b"\0")
    rest = _tar(tmp_path / "x.tar", *_samples(1)).read_bytes()
    (tmp_path / "x.tar").write_bytes(block + rest)
    with pytest.raises(DataError, match=r"no samples .* damaged at byte (0|1024)"):
        _open(f"webdataset:{tmp_path}")


def test_unusable_tars(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "zip").mkdir()
    (tmp_path / "zip" / "x.tar").write_bytes(gzip.compress(_tar(tmp_path / "a" / "x.tar", *_samples(1)).read_bytes()))
    _tar(tmp_path / "b" / "x.tar", ("a.npy", b"1"), ("README", b"2"))
    _tar(tmp_path / "c" / "x.tar")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "x.tar").write_bytes(b"")
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "x.tar").write_bytes(b"not a tar " * 200)
    for name, reason in [
        ("empty", "holds no .tar files"),
        ("zip", "x.tar is compressed with gzip; unpack it"),
        ("b", "has no samples .* in 1 tar files$"),
        ("c", "has no samples"),
        ("d", "damaged at byte 0 .the file ends without an end mark"),
        ("e", "damaged at byte 0 .no header of a tar"),
    ]:
        with pytest.raises(DataError, match=reason) as error:
            _open(f"webdataset:{tmp_path / name}")
        assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="names no .tar file"):
        _open("webdataset:")
    _tar(tmp_path / "d" / "y.tar", *_samples(2))  # beside an empty file
    assert len(_open(f"webdataset:{tmp_path / 'd'}")) == 2
    _tar(tmp_path / "f" / "x.tar", ("a.png", PNG[0]))
    with pytest.raises(DataError, match="no usable record among 1: 1 × it has no caption"):
        _decode(_open(f"webdataset:{tmp_path / 'f'}"))
    (tmp_path / "f" / "x.tar").unlink()
    (tmp_path / "f" / "x.tar").mkdir()
    with pytest.raises(DataError, match="holds no .tar files"):
        _open(f"webdataset:{tmp_path / 'f'}")


def test_tar_that_disappears(tmp_path):
    file = _tar(tmp_path / "x.tar", *_samples(2))
    source = _open(f"webdataset:{tmp_path}")
    file.unlink()
    with pytest.raises(InvalidRecordError, match="its tar cannot be read"):
        source[0]


@pytest.mark.slow
def test_a_thousand_indexed_tars_open_fast(tmp_path):
    members = _samples(10)  # 20 members
    for i in range(1000):
        _tar(tmp_path / f"{i:05}.tar", *members)
    times = []
    for _ in range(2):
        start = time.perf_counter()
        source = sources.open_source(f"webdataset:{tmp_path}/{{00000..00999}}.tar")
        times.append(time.perf_counter() - start)
    print(f"1,000 tars of 20 members: {times[0]:.2f} s without and {times[1]:.2f} s with stored indices")
    assert 9_000 < len(source) < 10_000 and times[1] < 10


# ---- Parquet ---------------------------------------------------------------------------------------------------------


def _image_type(data):
    return [None if d is None else {"bytes": d, "path": f"{i}.png"} for i, d in enumerate(data)]


def _write(file, columns, rows=2, **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        columns if isinstance(columns, pa.Table) else pa.table(columns), file, row_group_size=rows, **options
    )
    return file


LAYOUTS = {
    "hugging face": {"image": _image_type(PNG), "text": ["A", " B ", "C", "D"], "thumbnail": PNG[::-1]},
    "img2dataset": {"jpg": PNG, "txt": list("ABCD"), "url": ["u"] * 4, "caption": ["A", "B\n", "C", "D"], "key": PNG},
    "lists": {"webp": PNG, "captions": [["A"], ["B", " "], ["C"], ["D"]]},
    "bytes": {"png": PNG, "txt": [b"A", b"B", b"C", b"D"]},
    "large": {
        "image": pa.array(_image_type(PNG), pa.struct([("bytes", pa.large_binary()), ("path", pa.string())])),
        "caption": pa.array(list("ABCD")).dictionary_encode(),
    },
    "instructpix2pix": {
        "original_prompt": list("wxyz"),
        "original_image": _image_type(PNG),
        "edit_prompt": ["A", "B ", "C", "D"],
        "edited_image": _image_type(PNG[::-1]),
    },
    "edits": {"source_image": PNG, "target_image": PNG[::-1], "instruction": list("ABCD"), "text": list("wxyz")},
    "text": {"text": ["A", " B", "C", "D"], "url": ["u"] * 4, "score": [1.0] * 4},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parquet_layouts(tmp_path, layout):
    _write(tmp_path / "x.parquet", LAYOUTS[layout], rows=3)
    assert sources.detect(str(tmp_path)) == "parquet"
    for name in ("", "x.parquet", "*.parquet"):
        source = _open(f"parquet:{tmp_path / name}")
        found = [source[i] for i in (3, 0, 2, 1)]
        assert [r.key for r in found] == [f"x.parquet/{i}" for i in (4, 1, 3, 2)]
        assert [source.key(i) for i in range(4)] == [f"x.parquet/{i}" for i in (1, 2, 3, 4)]
        for i, record in zip((3, 0, 2, 1), found):
            is_edit = layout in ("instructpix2pix", "edits")
            images = [] if layout == "text" else [PNG[i], PNG[3 - i]] if is_edit else [PNG[i]]
            text = "ABCD"[i]
            assert list(record.images) == images
            assert (list(record.captions), record.instruction, record.text) == (
                [text] if images and not is_edit else [],
                text if is_edit else "",
                text if layout == "text" else "",
            )
            flatten(record)
    with pytest.raises(IndexError):
        source.source[4]


def test_parquet_files_and_row_groups(tmp_path):
    pixels = lambda rows: {"image": [PNG[0]] * len(rows), "text": [f"t{i}" for i in rows]}
    _write(tmp_path / "a.parquet", pixels(range(5)))
    empty = {"image": pa.array([], pa.binary()), "text": pa.array([], pa.string())}
    _write(tmp_path / "b.parquet", empty)
    _write(tmp_path / "c" / "d.parquet", pixels(range(5, 8)), rows=1)
    source = _open(f"parquet:{tmp_path}")
    assert [source[i].captions[0] for i in range(8)] == [f"t{i}" for i in range(8)]
    keys = [source.key(i) for i in range(8)]
    assert keys == [*(f"a.parquet/{i}" for i in range(1, 6)), *(f"c/d.parquet/{i}" for i in range(1, 4))]
    assert len(_open(f"parquet:{tmp_path}/{{a,b}}.parquet")) == 5
    with pytest.raises(DataError, match="has no rows in 1 Parquet files"):
        _open(f"parquet:{tmp_path}/b.parquet")


def test_parquet_files_named_by_their_split(tmp_path):
    columns = lambda text: {"image": PNG[:1] * 2, "text": [f"{text} {i}" for i in range(2)]}

    def texts(split, path=tmp_path):
        source = sources.open_source(f"parquet:{path}", split, held_out=0.5)
        return [source[i].captions[0] for i in range(len(source))]

    names = ("data/train-00000-of-00002", "data/train-00001-of-00002", "data/validation-00000-of-00001")
    for name in names:
        _write(tmp_path / f"{name}.parquet", columns(name[5:-9]))
    train = ["train-00000 0", "train-00000 1", "train-00001 0", "train-00001 1"]
    assert texts("train") == train and texts("test") == ["validation-00000 0", "validation-00000 1"]
    _write(tmp_path / "more.parquet", columns("more"))
    _write(tmp_path / "testing.parquet", columns("testing"))
    train += ["more 0", "more 1", "testing 0", "testing 1"]
    assert texts("train") == train and texts("test") == ["validation-00000 0", "validation-00000 1"]
    _write(tmp_path / "test.parquet", columns("test"))
    assert texts("train") == train and texts("test") == ["test 0", "test 1"]
    key = sources.open_source(f"parquet:{tmp_path}", "test").key(0)
    assert key == "test.parquet/1"
    # a pattern names the files itself, and without one of the splits records are held out
    found = [sorted(texts(split, tmp_path / "data" / "train-*.parquet")) for split in ("train", "test")]
    assert sorted(sum(found, [])) == train[:4] and all(found)
    for file in (*(tmp_path / f"{name}.parquet" for name in names[:2]), *tmp_path.glob("[mt]*ing.parquet")):
        file.unlink()
    (tmp_path / "more.parquet").unlink()
    assert len(texts("train") + texts("test")) == 4


@needs_proc
def test_parquet_record_reads_one_row_group(tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    size, rows = 100_000, 10
    data = [random.bytes(size) for _ in range(100)]
    columns = {"image": _image_type(data), "text": ["t"] * 100, "unused": [random.bytes(size) for _ in range(100)]}
    _write(tmp_path / "x.parquet", columns, rows=rows)
    source = _open(f"parquet:{tmp_path}").source

    def fresh(index):
        source._tables = recent.Recent(parquet.CACHE_BYTES)
        return source[index]

    source[0]  # imports
    for index in (5, 55, 99):
        assert fresh(index).images == [data[index]]
        read = _bytes_read(lambda: fresh(index))  # noqa: B023
        assert rows * size < read < 2 * size + 2**21 and read < 1.2 * rows * size  # and no other columns
        assert _bytes_read(lambda: source[index - index % rows]) < 4096  # noqa: B023


def test_large_row_groups_are_named(tmp_path, caplog):
    data = [np.random.default_rng(i).bytes(300_000) for i in range(10)]
    _write(tmp_path / "x.parquet", {"image": data, "text": ["t"] * 10}, rows=10)
    _write(tmp_path / "y.parquet", {"image": data, "text": ["t"] * 10}, rows=6)
    source = _open(f"parquet:{tmp_path}")
    assert source[13].images == [data[3]]
    (warning,) = [r.getMessage() for r in caplog.records if "row groups" in r.getMessage()]
    assert "x.parquet has row groups of up to 3.0 MB" in warning
    assert "pyarrow.parquet.write_table(table, file, row_group_size=6)" in warning
    caplog.clear()
    _write(tmp_path / "x.parquet", {"image": data, "text": ["t"] * 10}, rows=6)
    _open(f"parquet:{tmp_path}")
    assert not caplog.records


def test_recent():
    loads = []

    def get(cache, key, size=4):
        return cache.get(key, lambda: (loads.append(key) or key * 2, size))

    cache = recent.Recent(10)
    assert [get(cache, k) for k in (1, 2, 1, 3, 1, 2)] == [2, 4, 2, 6, 2, 4] and loads == [1, 2, 3, 2]
    get(cache, 5, size=100)  # one that is too large replaces all others
    assert get(cache, 5) == 10 and list(cache._sizes) == list(cache._futures) == [5] and cache._total == 100
    get(cache, 1)
    assert list(cache._sizes) == [1] and cache._total == 4
    with pytest.raises(ZeroDivisionError):
        cache.get(7, lambda: 1 / 0)
    assert get(cache, 7) == 14
    assert get(pickle.loads(pickle.dumps(cache)), 7) == 14
    cache.drop(lambda value: value == 14)
    assert list(cache._sizes) == list(cache._futures) == [1] and cache._total == 4 and get(cache, 7) == 14

    def slow():
        time.sleep(0.05)
        loads.append(99)
        return 9, 4

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: cache.get(99, slow), range(8))) == [9] * 8
    assert loads.count(99) == 1


def test_parquet_in_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "CACHE_BYTES", 3000)
    _write(
        tmp_path / "x.parquet", {"image": [PNG[i % 4] for i in range(200)], "text": [f"t{i}" for i in range(200)]}, 5
    )
    source = _open(f"parquet:{tmp_path}")
    order = np.random.default_rng(0).integers(0, 200, 1000).tolist()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: source[i], order))
    assert [(r.images[0], r.captions[0]) for r in found] == [(PNG[i % 4], f"t{i}") for i in order]
    assert source.source._tables._total <= 3000 and len(source.source._tables._sizes) > 1


def _bad_rows():
    """Reason → columns whose first row is unusable, and the second one is usable."""
    edit = lambda **c: {"source_image": PNG[:2], "target_image": PNG[2:], "instruction": ["A.", "B."], **c}
    data = pa.array([b"caf\xe9", b"B."]).buffers()
    latin = pa.Array.from_buffers(pa.string(), 2, data)  # not checked when it is made
    return {
        "its image is null": {"image": _image_type([None, PNG[0]]), "text": ["A.", "B."]},
        "its jpg is null": {"jpg": [None, PNG[0]], "caption": ["A.", "B."]},
        "its image is a path without bytes": {
            "image": [{"bytes": None, "path": "a.png"}, {"bytes": PNG[0], "path": "b.png"}],
            "text": ["A.", "B."],
        },
        "its image is empty": {"image": [b"", PNG[0]], "text": ["A.", "B."]},
        "not a readable image": {"image": [b"GIF", PNG[0]], "text": ["A.", "B."]},
        "too large or too elongated": {"image": [LARGE, PNG[0]], "text": ["A.", "B."]},
        "not a readable image: Image size (3600000000 pixels)": {"image": [BOMB, PNG[0]], "text": ["A.", "B."]},
        "its text is null": {"image": PNG[:2], "text": [None, "B."]},
        "its caption is empty": {"image": PNG[:2], "caption": [" ", "B."]},
        "its captions is empty": {"image": PNG[:2], "captions": [[], ["B."]]},
        "its captions is NoneType, not text": {"image": PNG[:2], "captions": [[None], ["B."]]},
        "its txt is not UTF-8 text": {"image": PNG[:2], "txt": [b"caf\xe9", b"B."]},
        "its text is not UTF-8 text": {"image": PNG[:2], "text": latin},
        "its source_image is null": edit(source_image=[None, PNG[0]]),
        "its target_image is empty": edit(target_image=[b"", PNG[0]]),
        "it has no instruction": edit(instruction=["  ", "B."]),
        "its instruction is null": edit(instruction=[None, "B."]),
        "it has no text": {"text": ["", "B."]},
    }


@pytest.mark.parametrize("reason", _bad_rows())
def test_malformed_rows_are_counted(tmp_path, reason):
    _write(tmp_path / "x.parquet", _bad_rows()[reason])
    data = _decode(_open(f"parquet:{tmp_path}"))
    assert data[0].record.key == data[1].record.key == "x.parquet/2"
    assert list(data.invalid) == [0] and data.invalid[0].startswith(reason)


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"image": PNG}, "needs an image .* and a caption .* it has the columns image$"),
        ({"photo": PNG, "text_en": list("ABCD")}, "it has the columns photo, text_en$"),
        ({"source_image": PNG, "target_image": PNG, "text": list("ABCD")}, "needs an image"),
        ({"url": list("ABCD"), "caption": list("ABCD")}, "has the column url and no image bytes"),
        ({"URL": list("ABCD"), "TEXT": list("ABCD")}, "has the column URL and no image bytes"),
        ({"image": ["a.png"] * 4, "text": list("ABCD")}, "column image has the type string; it must be encoded bytes"),
        ({"image": [{"path": "a"}] * 4, "text": list("ABCD")}, "column image has the type struct<path: string>"),
        ({"image": [[d] for d in PNG], "text": list("ABCD")}, "column image has the type list<"),
        ({"image": PNG, "text": [1, 2, 3, 4]}, "column text has the type int64; it must be text or lists of texts"),
        ({"image": PNG, "captions": [[1]] * 4}, "column captions has the type list<"),
        ({"text": [["A"]] * 4}, "column text has the type list<.* it must be text$"),
        (
            {"source_image": PNG, "target_image": PNG, "instruction": [["A"]] * 4},
            "column instruction has the type list<.* it must be text$",
        ),
    ],
)
def test_columns_that_are_not_usable(tmp_path, columns, reason):
    _write(tmp_path / "x.parquet", columns)
    with pytest.raises(DataError, match=reason) as error:
        _open(f"parquet:{tmp_path}")
    assert "\n" not in str(error.value) and "x.parquet" in str(error.value)


def test_damaged_parquet_files(tmp_path):
    good = _write(tmp_path / "x" / "good.parquet", {"image": PNG, "text": list("ABCD")}).read_bytes()
    bad = tmp_path / "x" / "x.parquet"
    for content in (
        b"",
        b"PAR1",
        good[:-8],
        good[: len(good) // 2],
        b"text " * 50,
        good[:-30] + b"\xff" * 22 + good[-8:],
    ):
        bad.write_bytes(content)
        with pytest.raises(DataError, match="x/x.parquet (is not a whole Parquet file|cannot be read)") as error:
            _open(f"parquet:{tmp_path}/x")
        assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="holds no .parquet files"):
        (tmp_path / "y").mkdir()
        _open(f"parquet:{tmp_path}/y")
    # pages of the first row group
    at = good.index(PNG[0][:30])
    bad.write_bytes(good[:4] + b"\xff" * (at - 4) + good[at:])
    data = _decode(_open(f"parquet:{bad}"))
    assert data[0].record.key == "x.parquet/3" and set(data.invalid) == {0, 1}
    source = _open(f"parquet:{bad}")
    bad.unlink()
    with pytest.raises(InvalidRecordError, match="its row group cannot be read"):
        source[3]


# ---- Pairs of images -------------------------------------------------------------------------------------------------


def _edits(root, *rows):
    (root / "i").mkdir(parents=True, exist_ok=True)
    for i, data in enumerate(PNG):
        (root / "i" / f"{i}.png").write_bytes(data)
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    (root / "edits.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return root


def _edit(source="i/0.png", target="i/1.png", instruction="Make it red.", **fields):
    row = dict(source=source, target=target, instruction=instruction, **fields)
    return {name: value for name, value in row.items() if value is not None}


def test_edits(tmp_path):
    _edits(tmp_path, _edit(), _edit("i/2.png", "i/2.png", " Nothing. ", seed=3))
    assert sources.detect(str(tmp_path)) == "edit"
    for description in (f"edit:{tmp_path}", f"edit:{tmp_path}/edits.jsonl", str(tmp_path)):
        source = _open(description)
        assert [(source.key(i), source[i].images, source[i].instruction) for i in range(2)] == [
            ("edits.jsonl/1", PNG[:2], "Make it red."),
            ("edits.jsonl/2", [PNG[2], PNG[2]], "Nothing."),
        ]
        flatten(source[0])
    (tmp_path / "edits.jsonl").rename(tmp_path / "x")
    with pytest.raises(DataError, match="No such file"):
        _open(f"edit:{tmp_path}/edits.jsonl")


def _bad_edits():
    return {
        "it has no source": _edit(source=None),
        "it has no source and no target": _edit(source=None, target=None),
        "it has no instruction": _edit(instruction=None),
        "its instruction is list, not text": _edit(instruction=["A."]),
        "its image is list": _edit(source=["i/0.png"]),
        "its image is 7": _edit(target=7),
        "its image '/etc/passwd' is not a path inside": _edit(target="/etc/passwd"),
        "its image '../x.png' is not a path inside": _edit(source="../x.png"),
        "its image 'i/../../x.png' is not a path inside": _edit(source="i/../../x.png"),
        "its image is a URL": _edit(target="https://example.org/a.png"),
        "its image i/9.png does not exist": _edit(target="i/9.png"),
        "its image i is not a file": _edit(target="i"),
        "row 1 is not a JSON object": b'"i/0.png"',
        "row 1 is not JSON": b'{"source": "i/0.png", ',
        "row 1 is not UTF-8": b'{"source": "\xff"}',
        "too large or too elongated": _edit(target="large.png"),
        "not a readable image: Image size (3600000000 pixels)": _edit(target="bomb.png"),
        "too small": _edit(target="small.png"),
    }


@pytest.mark.parametrize("reason", _bad_edits())
def test_malformed_edits_are_counted(tmp_path, reason):
    (tmp_path / "bomb.png").write_bytes(BOMB)
    (tmp_path / "large.png").write_bytes(LARGE)
    (tmp_path / "small.png").write_bytes(_png(1, (2, 2)))
    _edits(tmp_path, _bad_edits()[reason], _edit())
    data = _decode(_open(f"edit:{tmp_path}"))
    assert data[0].record.key == data[1].record.key == "edits.jsonl/2"
    assert list(data.invalid) == [0] and data.invalid[0].startswith(reason)


# ---- All three -------------------------------------------------------------------------------------------------------


def _make(kind, root):
    if kind == "webdataset":
        _tar(root / "a.tar", *_samples(20))
        _tar(root / "b.tar", *_samples(20))
    elif kind == "parquet":
        for name in "ab":
            _write(root / f"{name}.parquet", {"jpg": PNG * 5, "caption": list("ABCD") * 5}, rows=3)
    else:
        _edits(root, *[_edit(instruction=f"Edit {i}.") for i in range(40)])
    return f"{kind}:{root}"


@pytest.mark.parametrize("kind", ["webdataset", "parquet", "edit"])
def test_splits_keys_fingerprints_and_pickles(tmp_path, kind):
    description = _make(kind, tmp_path / "x")
    splits = [sources.open_source(description, split, held_out=0.3) for split in ("train", "test")]
    keys = [{s.key(i) for i in range(len(s))} for s in splits]
    assert not keys[0] & keys[1] and len(keys[0] | keys[1]) == 40 and all(keys)
    for source in splits:
        copied = pickle.loads(pickle.dumps(source))
        assert [copied[i] for i in range(len(copied))] == [source[i] for i in range(len(source))]
    before = splits[0].fingerprint()
    assert before == sources.open_source(description).fingerprint()
    os.rename(tmp_path / "x", tmp_path / "y")  # a data set may be moved
    moved = sources.open_source(f"{kind}:{tmp_path / 'y'}", "train", held_out=0.3)
    assert {moved.key(i) for i in range(len(moved))} == keys[0] and moved.fingerprint() == before
    if kind == "webdataset":
        _tar(tmp_path / "y" / "b.tar", *_samples(20), ("00003.txt", b"Another."))
    elif kind == "parquet":
        _write(tmp_path / "y" / "b.parquet", {"jpg": PNG[::-1] * 5, "caption": list("ABCD") * 5}, rows=3)
    else:
        (tmp_path / "y" / "i" / "1.png").write_bytes(PNG[3])
    assert sources.open_source(f"{kind}:{tmp_path / 'y'}").fingerprint() != before


def test_detect(tmp_path):
    (tmp_path / "0.png").write_bytes(PNG[0])
    assert sources.detect(str(tmp_path)) == "folder"
    (tmp_path / "00000").mkdir()
    _write(tmp_path / "00000.parquet", {"url": ["u"], "caption": ["A"]})  # what img2dataset writes beside its files
    assert sources.detect(str(tmp_path)) == "folder"
    _edits(tmp_path, _edit())
    assert sources.detect(str(tmp_path)) == "edit"
    _write(tmp_path / "x.parquet", LAYOUTS["text"])
    assert sources.detect(str(tmp_path)) == "parquet"
    _tar(tmp_path / "00000.tar", *_samples(1))
    assert sources.detect(str(tmp_path)) == "webdataset"
    (tmp_path / "dataset_info.json").write_text("{}")
    assert sources.detect(str(tmp_path)) == "tfds"


@pytest.fixture(autouse=True)
def _log_level(caplog):
    caplog.set_level(logging.INFO)
