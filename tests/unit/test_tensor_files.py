"""Tensor files: what is written can be read by others and here, and every bad file gets one line that names it."""

import collections
import json
import os
import pickle
import random
import re
import struct
import sys

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from unimm_jax.errors import WeightsFileError
from unimm_jax.interop import files
from unimm_jax.interop.files import DTYPES, Tensors, find_files, write_safetensors


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def sample(shape, dtype, seed=0):
    """Random values of any dtype in `DTYPES`."""
    values = np.random.default_rng(seed).integers(0, 100, shape)
    return np.asarray(values % 2 if np.dtype(dtype) == np.bool_ else values).astype(dtype)


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write_raw(file, header, data=bytes(range(24))):
    """A safetensors file of any header: a JSON value, or bytes that are taken as they are."""
    body = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(body)) + body + data)
    return file


def error_of(source):
    """The message of the refusal: one line."""
    with pytest.raises(WeightsFileError) as caught:
        Tensors(source)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1000
    return message


def check(message, pattern):
    assert re.search(pattern, message), message


def assert_same(found, expected):
    """Equal names, shapes, dtypes and bytes."""
    assert set(found.shapes) == set(expected)
    for name, array in expected.items():
        assert name in found and found.shapes[name] == array.shape
        assert found.dtype(name) == found[name].dtype == array.dtype and found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes(), name


SHAPES = {"matrix": (3, 5), "vector": (7,), "scalar": (), "empty": (0, 3), "empty2": (2, 0), "last": (1, 1, 2)}


def every_kind():
    return {f"{code}.{key}": sample(s, d, i) for code, d in DTYPES.items() for i, (key, s) in enumerate(SHAPES.items())}


# ---- What is valid ---------------------------------------------------------------------------------------------------


def test_every_dtype_and_shape_of_the_library_is_read(tmp_path):
    expected = every_kind()
    safetensors.numpy.save_file(expected, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_same(Tensors(tmp_path / "model.safetensors"), expected)
    assert_same(Tensors(str(tmp_path)), expected)
    assert "other" not in Tensors(tmp_path)


def test_tensors_that_are_not_aligned_are_read(tmp_path):
    header = {"b": entry([3], 0, 3, "U8"), "empty": entry([0], 3, 3), "h": entry([2], 3, 7, "BF16")}
    file = write_raw(tmp_path / "model.safetensors", json.dumps(header | {"f": entry([2], 7, 15)}).encode() + b" ")
    file.write_bytes(file.read_bytes()[: -24 + 15])
    data = file.read_bytes()[-15:]
    found = Tensors(file)
    assert found["b"].tolist() == [0, 1, 2] and found["empty"].size == 0
    assert found["h"].tobytes() == data[3:7] and found["f"].tobytes() == data[7:15]
    assert np.array_equal(found["f"] + 0, np.frombuffer(data[7:], np.float32))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.int32, np.bool_])
def test_what_is_written_is_read_by_the_library_and_here(dtype, tmp_path):
    expected = {key: sample(shape, dtype) for key, shape in SHAPES.items()}
    shapes = {key: array.shape for key, array in expected.items()}
    names = list(write_safetensors(tmp_path, "model", shapes, np.dtype(dtype), expected.items()))
    assert names == list(shapes) and [f.name for f in tmp_path.iterdir()] == ["model.safetensors"]
    assert_same(Tensors(tmp_path), expected)
    theirs = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert all(np.array_equal(theirs[name], array) for name, array in expected.items())


def test_torch_reads_what_is_written(torch, tmp_path):
    import safetensors.torch

    array = sample((3, 4), np.float32)
    tensors = {"a": array, "b": array.T}  # converted to bfloat16; b is not contiguous
    list(write_safetensors(tmp_path, "m", {"a": (3, 4), "b": (4, 3)}, ml_dtypes.bfloat16, tensors.items()))
    theirs = safetensors.torch.load_file(tmp_path / "m.safetensors")
    assert all(torch.equal(theirs[k], torch.tensor(v).to(torch.bfloat16)) for k, v in tensors.items())


def test_shards_have_an_index_and_are_read_as_one_model(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SHARD_BYTES", 100)
    expected = {f"layer.{i}": sample((4, 5), np.float32, i) for i in range(3)} | {"last": sample((), np.float32)}
    shapes = {name: array.shape for name, array in expected.items()}
    list(write_safetensors(tmp_path, "model", shapes, np.float32, expected.items()))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(set(index["weight_map"].values())) == names
    assert index["metadata"] == {"total_size": 4 * 61} and set(index["weight_map"]) == set(expected)
    (tmp_path / "consolidated.safetensors").write_bytes(b"not in the index, so not read")
    assert [f.name for f in find_files(tmp_path)] == names
    assert_same(Tensors(tmp_path), expected)
    for name, file in index["weight_map"].items():
        assert np.array_equal(safetensors.numpy.load_file(tmp_path / file)[name], expected[name])


@pytest.mark.parametrize("given", [{"a": (2,)}, {"a": (2,), "c": (3,)}, {"a": (2,), "b": (4,)}])
def test_writing_refuses_tensors_other_than_announced(given, tmp_path):
    tensors = [(name, np.zeros(shape, np.float32)) for name, shape in given.items()]
    with pytest.raises(ValueError, match=r"expected the tensor b \(3,\), got"):
        list(write_safetensors(tmp_path, "model", {"a": (2,), "b": (3,)}, np.float32, tensors))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and the file must be sparse")
def test_a_large_file_is_mapped_and_not_loaded(tmp_path):
    file = tmp_path / "model.safetensors"
    size = 14 * 2**30
    header = {"big": entry([size // 2], 0, size, "BF16"), "small": entry([2], size, size + 8)}
    write_raw(file, header, b"")
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size + size)
        stream.seek(0, os.SEEK_END)
        stream.write(np.float32([1, 2]).tobytes())

    def resident():
        with open("/proc/self/statm") as stream:
            return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    found = Tensors(file)
    assert found["small"].tolist() == [1, 2] and found["big"][-1] == 0 and found.shapes["big"] == (size // 2,)
    assert resident() - before < 50 * 2**20
    file.unlink()


def test_torch_files_are_read_in_both_formats(torch, tmp_path):
    kept = {code: d for code, d in DTYPES.items() if code not in ("U16", "U32", "U64")}
    expected = {f"{code}.{k}": sample(s, d) for code, d in kept.items() for k, s in SHAPES.items()}
    tensors = {}
    for name, array in expected.items():
        plain = array.astype(np.float32) if array.dtype == ml_dtypes.bfloat16 else array
        tensors[name] = torch.tensor(plain).to(torch.bfloat16) if plain is not array else torch.tensor(plain)
    tensors |= {"parameter": torch.nn.Parameter(torch.ones(2)), "strided": torch.arange(6.0).reshape(2, 3).T}
    tensors["negative"] = torch.tensor([1 + 2j]).conj().imag  # a lazy negation
    expected |= {"parameter": np.ones(2, np.float32), "strided": np.arange(6, dtype=np.float32).reshape(2, 3).T}
    expected["negative"] = np.float32([-2])
    for new in (True, False):
        torch.save(tensors, tmp_path / "model.bin", _use_new_zipfile_serialization=new)
        assert_same(Tensors(tmp_path), expected)
    torch.save({"state_dict": collections.OrderedDict(tensors), "step": 3}, tmp_path / "model.bin")
    assert_same(Tensors(tmp_path), expected)
    torch.save(torch.ones(2, 3), tmp_path / "model.bin")
    assert_same(Tensors(tmp_path / "model.bin"), {"<tensor>": np.ones((2, 3), np.float32)})
    torch.save({"a": torch.ones(2, dtype=torch.uint16)}, tmp_path / "model.bin")
    assert_same(Tensors(tmp_path), {"a": np.ones(2, np.uint16)})


# ---- safetensors: bad files ------------------------------------------------------------------------------------------

FIRST = {"first": entry([2], 0, 8)}
TWICE = '{"a": ENTRY, "a": ENTRY}'.replace("ENTRY", json.dumps(entry([6], 0, 24)))


@pytest.mark.parametrize(
    "header, match",
    [
        (FIRST | {"second": entry([5], 4, 24)}, "second starts at data byte 4, but the tensor before it ends at 8"),
        ({"first": entry([6], 0, 24), "second": entry([6], 0, 24)}, "starts at data byte 0, .* ends at 24"),
        (FIRST | {"second": entry([3], 12, 24)}, "second starts at data byte 12, but the tensor before it ends at 8"),
        ({"first": entry([5], 4, 24)}, "first starts at data byte 4"),
        (FIRST, "16 bytes follow the last tensor"),
        ({}, "24 bytes follow"),
        ({"first": entry([2], -8, 0), "second": entry([6], 0, 24)}, r"first has an invalid .* data_offsets \[-8, 0\]"),
        ({"first": entry([2], 8, 0), "second": entry([6], 0, 24)}, r"first has an invalid .* data_offsets \[8, 0\]"),
        (FIRST | {"second": entry([8], 8, 40)}, "is truncated: second ends beyond the file"),
        (FIRST | {"second": entry([8], 8, 24)}, r"second has 16 bytes, which does not match its shape \[8\]"),
        ({"first": entry([2**40, 2**40], 0, 24)}, "first has 24 bytes, which does not match"),
        ({"first": entry([2**62] * 60, 0, 24)}, "first has 24 bytes, which does not match"),
        ({"first": entry([10**1000] * 9, 0, 24)}, "first has an invalid shape"),
        ({"first": entry([6.0], 0, 24)}, r"first has an invalid shape \[6.0\]"),
        ({"first": entry(["6"], 0, 24)}, r"first has an invalid shape \['6'\]"),
        ({"first": entry("6", 0, 24)}, "first has an invalid shape 6"),
        ({"first": entry([True, 6], 0, 24)}, r"first has an invalid shape \[True, 6\]"),
        ({"first": entry([-2, -3], 0, 24)}, r"first has an invalid shape \[-2, -3\]"),
        ({"first": entry(None, 0, 24)}, "first has an invalid shape None"),
        ({"first": entry([1] * 70 + [6], 0, 24)}, "first cannot be read: .*dimension"),
        ({"first": entry([0, 2**63], 0, 0), "second": entry([6], 0, 24)}, "first cannot be read"),
        ({"first": entry([0, 2**62, 4], 0, 0), "second": entry([6], 0, 24)}, "first cannot be read: array is too big"),
        ({"first": {"dtype": "F32", "shape": [6], "data_offsets": [0, 24, 24]}}, "first has an invalid"),
        ({"first": {"dtype": "F32", "shape": [6], "data_offsets": {"a": 1}}}, "first has an invalid"),
        ({"first": {"dtype": "F32", "shape": [6]}}, "first has no dtype, no shape or no data_offsets"),
        ({"first": [1, 2]}, "first has no dtype, no shape or no data_offsets"),
        ({"first": entry([24], 0, 24, "F8_E4M3")}, "first has the dtype F8_E4M3, which is not supported"),
        ({"first": entry([3], 0, 24, "C64")}, "first has the dtype C64, which is not supported"),
        ({"first": entry([48], 0, 24, "F4")}, "first has the dtype F4, which is not supported"),
        ({"first": entry([6], 0, 24, "Q4_0")}, "first has the dtype Q4_0, which is not supported"),
        ({"first": entry([6], 0, 24, ["F32"])}, r"first has the dtype \['F32'\], which is not supported"),
        ({"__metadata__": {"a": 1}, "first": entry([6], 0, 24)}, "is corrupt: invalid JSON in header"),
        (TWICE.encode(), "is corrupt: a occurs more than once in its header"),
        (TWICE.replace("F32", "I32", 1).encode(), "is corrupt: a occurs more than once in its header"),
        (b'{"a":{"dtype":"F32","dtype":"I32","shape":[6],"data_offsets":[0,24]}}', "dtype occurs more than once"),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "its header cannot be read"),
        (b'{"a":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001, "its header cannot be read"),
        (b'{"a":' + b"[" * 300 + b"]" * 300 + b"}", "a has no dtype"),
        (b'{"a":' + b"9" * 5000 + b"}", "its header cannot be read"),
        (b"{" * 40, "its header cannot be read"),
        (b'{"\xff": 1}', "its header cannot be read"),
        (b"[1, 2]", "its header cannot be read"),
        (b"3", "its header cannot be read"),
        (b"", "its header cannot be read"),
        (json.dumps({"a\nb": entry([6.0], 0, 24)}).encode(), r"'a\\nb' has an invalid shape"),
    ],
)
def test_a_bad_header_is_refused(header, match, tmp_path):
    message = error_of(write_raw(tmp_path / "model.safetensors", header))
    assert str(tmp_path / "model.safetensors") in message
    check(message, match)


def test_truncated_files_are_refused_at_every_length(tmp_path):
    file = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({"a": sample((3,), np.float32), "b": sample((5,), np.int8)}, file)
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        check(error_of(file), "model.safetensors is truncated: (its header does not fit|[ab] ends beyond the file)")
    file.write_bytes(whole + b"\0")
    check(error_of(file), "1 bytes follow the last tensor")
    file.write_bytes(whole)
    assert set(Tensors(file).shapes) == {"a", "b"}


def test_header_lengths_that_cannot_be_are_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    body = json.dumps({"a": entry([6], 0, 24)}).encode()
    for length in (2**64 - 1, 2**63, len(body) + 25):
        file.write_bytes(struct.pack("<Q", length) + body + bytes(24))
        check(error_of(file), "is truncated: its header does not fit")
    for length in (0, 1, len(body) - 1, len(body) + 1, len(body) + 24):
        file.write_bytes(struct.pack("<Q", length) + body + bytes(24))
        check(error_of(file), "is corrupt: its header cannot be read")
    with file.open("wb") as stream:  # sparse; must not be read into memory
        stream.write(struct.pack("<Q", 5 * 2**30) + b"{")
        stream.truncate(6 * 2**30)
    check(error_of(file), "its header is larger than")
    file.unlink()


def test_files_that_are_not_weights_are_refused(tmp_path):
    for suffix in ("safetensors", "bin"):
        file = tmp_path / f"model.{suffix}"
        file.symlink_to(tmp_path / "nowhere")
        check(error_of(tmp_path), f"model.{suffix} cannot be read: No such file")
        file.unlink()
        file.mkdir()
        check(error_of(tmp_path), f"model.{suffix} cannot be read: Is a directory")
        file.rmdir()
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 34\n")
        check(error_of(tmp_path), f"model.{suffix} is a Git LFS pointer")
        file.write_text("<html>Access denied</html>")
        check(error_of(tmp_path), f"model.{suffix} is truncated")
        file.unlink()
    check(error_of(tmp_path), "contains no .safetensors and no .bin file")
    check(error_of(tmp_path / "nowhere"), "there is no file or directory .*nowhere")
    check(error_of(tmp_path / ("a" * 300)), "cannot be read: File name too long")


def test_variants_of_a_file_are_left_out(tmp_path):
    """As in the directories of Stable Diffusion on the Hub."""
    for number, name in enumerate(("unet", "unet.fp16", "unet.non_ema", "other.fp16", "part.0")):
        safetensors.numpy.save_file({f"x{number}": sample((3,), np.float32)}, tmp_path / f"{name}.safetensors")
    assert [f.name for f in find_files(tmp_path)] == [
        "other.fp16.safetensors",
        "part.0.safetensors",
        "unet.safetensors",
    ]
    assert set(Tensors(tmp_path).shapes) == {"x0", "x3", "x4"}


def test_a_tensor_in_two_files_is_refused(tmp_path):
    for name in ("a", "b"):
        safetensors.numpy.save_file({"x": sample((3,), np.float32)}, tmp_path / f"{name}.safetensors")
    check(error_of(tmp_path), "x is in b.safetensors and in an earlier file of")


# ---- safetensors: random damage --------------------------------------------------------------------------------------


def strict_read(content):
    """A reader written for clarity: the tensors of a file, or None if the file breaks any rule of the format."""
    try:
        (length,) = struct.unpack("<Q", content[:8])
        pairs = json.loads(content[8 : 8 + length].decode(), object_pairs_hook=list)
        header = {name: dict(fields) for name, fields in pairs}
        assert len(content) >= 8 + length and len(header) == len(pairs)
        data, position, found = content[8 + length :], 0, {}
        header.pop("__metadata__", None)
        for name, fields in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = fields["data_offsets"]
            assert begin == position and end <= len(data)
            found[name] = np.frombuffer(data[begin:end], DTYPES[fields["dtype"]]).reshape(fields["shape"])
            position = end
        assert position == len(data)
        return found
    except (AssertionError, KeyError, TypeError, ValueError, struct.error):
        return None


def damage(rng, header, data):
    """One random change to a valid file: to a value of the header, to its text, or to the length of a part."""
    header = json.loads(json.dumps(header))
    fields = header[rng.choice([name for name in header if name != "__metadata__"])]
    odd = [-1, 0, 1, 2, 3, 4, 8, 16, 2**31, 2**63, 2**64, 1.5, "4", None, True, [], {}, [[1]], 10**400]
    kind = rng.randrange(10)
    if kind == 0:
        fields["data_offsets"][rng.randrange(2)] = rng.choice(odd)
    elif kind == 1:
        shift = rng.choice([-8, -4, -1, 1, 4, 8])
        fields["data_offsets"] = [x + shift for x in fields["data_offsets"]]
    elif kind == 2:
        fields["shape"] = [rng.choice(odd) for _ in range(rng.randrange(4))]
    elif kind == 3:
        fields["dtype"] = rng.choice([*DTYPES, "F8_E4M3", "F4", "C64", "f32", "", 3, None])
    elif kind == 4:
        other = header[rng.choice([name for name in header if name != "__metadata__"])]
        key = rng.choice(["dtype", "shape", "data_offsets"])
        fields[key], other[key] = other[key], fields[key]
    elif kind == 5:
        fields[rng.choice(["dtype", "shape", "data_offsets", "more"])] = rng.choice(odd)
    elif kind == 6:
        del fields[rng.choice(list(fields))]
    body = bytearray(json.dumps(header).encode())
    if kind == 7:
        for _ in range(rng.randrange(1, 4)):
            body[rng.randrange(len(body))] = rng.choice([rng.randrange(256), *b'0123456789[]{},:" '])
    elif kind == 8:  # a piece of the text removed, or put in twice
        begin = rng.randrange(len(body))
        end = begin + rng.randrange(1, 60)
        body[begin:end] = body[begin:end] * rng.choice([0, 2])
    length = len(body)
    if kind == 9:
        change = rng.randrange(3)
        data = data[: rng.randrange(len(data))] if change == 0 else data + bytes(rng.randrange(1, 9) * (change == 1))
        length += rng.choice([-9, -1, 1, 8, 1000, 2**40]) * (change == 2)
    return struct.pack("<Q", length) + bytes(body) + data


def test_random_damage_gives_the_right_tensors_or_an_error(tmp_path):
    arrays = {"a": (2, 3, "F32"), "b": (4, 1, "BF16"), "c": (3, 3, "U8"), "d": (0, 2, "I64"), "e": (2, 2, "I16")}
    header, position = {"__metadata__": {"format": "pt"}}, 0
    for name, (rows, columns, code) in arrays.items():
        size = rows * columns * DTYPES[code].itemsize
        header[name] = entry([rows, columns], position, position + size, code)
        position += size
    data = bytes(i % 2 for i in range(position))  # valid as bool too
    rng = random.Random(0)
    accepted = 0
    for number in range(1000):
        content = damage(rng, header, data)
        file = tmp_path / "model.safetensors"
        file.write_bytes(content)
        try:
            found = Tensors(file)
        except WeightsFileError as error:
            assert str(file) in str(error) and "\n" not in str(error), number
            continue
        expected = strict_read(content)
        assert expected is not None, (number, content)
        assert_same(found, expected)
        accepted += 1
    assert 20 < accepted < 500


# ---- Index files -----------------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path):
    """A folder with one shard, and a file of weights outside of it."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in (folder / "shard.safetensors", tmp_path / "outside.safetensors"):
        safetensors.numpy.save_file({"x": sample((3,), np.float32)}, file)
    return folder


def index(folder, content, suffix="safetensors"):
    text = content if isinstance(content, str | bytes) else json.dumps(content)
    file = folder / f"model.{suffix}.index.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


@pytest.mark.parametrize(
    "content, match",
    [
        (
            {"weight_map": {"x": "../outside.safetensors"}},
            "names ../outside.safetensors, which is outside its directory",
        ),
        ({"weight_map": {"x": "../model/shard.safetensors"}}, "which is outside its directory"),
        ({"weight_map": {"x": "a/../../outside.safetensors"}}, "which is outside its directory"),
        ({"weight_map": {"x": "{absolute}"}}, "names /.*outside.safetensors, which is outside its directory"),
        ({"weight_map": {"x": ["shard.safetensors"]}}, "the file of x is .*, which is not a file name"),
        ({"weight_map": {"x": {"y": "shard.safetensors"}}}, "the file of x is .*, which is not a file name"),
        ({"weight_map": {"x": 3}}, "the file of x is 3, which is not a file name"),
        ({"weight_map": {"x": None}}, "the file of x is None, which is not a file name"),
        ({"weight_map": {"ok": "shard.safetensors", "x": 3}}, "the file of x is 3, which is not a file name"),
        ({"weight_map": {}}, "is empty: its weight_map lists no tensors"),
        ({"weight_map": ["shard.safetensors"]}, '"weight_map" must map tensor names to file names'),
        ({"weight_map": 3}, '"weight_map" must map tensor names to file names'),
        ({"weight_map": None}, '"weight_map" must map tensor names to file names'),
        ({}, '"weight_map" must map tensor names to file names'),
        ([1], '"weight_map" must map tensor names to file names'),
        (3, '"weight_map" must map tensor names to file names'),
        ("", "is not a weight index: invalid JSON"),
        ("{", "is not a weight index: invalid JSON"),
        (b"\xff\xfe", "is not a weight index: invalid JSON"),
        ("[" * 100_000, "is not a weight index: invalid JSON"),
        ('{"weight_map": {"x": ' + "[" * 900 + "]" * 900 + "}}", "the file of x is .*, which is not a file name"),
        ({"weight_map": {"x": "missing.safetensors"}}, "names files that are not in .*model: missing.safetensors"),
        ({"weight_map": {str(i): f"{i}" for i in range(9)}}, "not in .*model: 0, 1, 2, 3, 4 and 4 more"),
        ({"weight_map": {"x": ""}}, "names files that are not in"),
        ({"weight_map": {"x": "."}}, "names files that are not in"),
        ({"weight_map": {"x": "a" * 5000}}, "names files that are not in"),
        ({"weight_map": {"x": "a\0b"}}, "names files that are not in"),
        ({"weight_map": {"x": "a\nb"}}, "names files that are not in"),
    ],
)
def test_a_bad_index_is_refused(content, match, sharded):
    if isinstance(content, dict) and content.get("weight_map") == {"x": "{absolute}"}:
        content["weight_map"]["x"] = str(sharded.parent / "outside.safetensors")
    for suffix in ("safetensors", "bin"):
        (sharded / "shard.safetensors").rename(sharded / f"shard.{suffix}")  # safetensors are preferred
        file = index(sharded, content, suffix)
        message = error_of(sharded)
        assert file.name in message
        check(message, match)
        file.unlink()


def test_an_index_that_is_not_a_file_is_refused(sharded):
    (sharded / "model.safetensors.index.json").mkdir()
    check(error_of(sharded), "model.safetensors.index.json cannot be read: Is a directory")


def test_links_of_an_index_stay_in_the_folder(sharded):
    index(sharded, {"weight_map": {"x": "link.safetensors"}})
    link = sharded / "link.safetensors"
    link.symlink_to(sharded.parent / "outside.safetensors")
    check(error_of(sharded), "names link.safetensors, a link to a file outside its directory; replace the link")
    link.unlink()
    (sharded / "folder").symlink_to(sharded.parent)
    index(sharded, {"weight_map": {"x": "folder/outside.safetensors"}})
    check(error_of(sharded), "a link to a file outside its directory")
    index(sharded, {"weight_map": {"x": "link.safetensors"}})
    link.symlink_to("link.safetensors")
    check(error_of(sharded), "names files that are not in")
    link.unlink()
    link.symlink_to("shard.safetensors")
    assert Tensors(sharded)["x"].shape == (3,)


def test_the_links_of_a_download_cache_are_followed(sharded, tmp_path):
    """Hugging Face's cache: files in snapshots/<revision> link to blobs/<hash>."""
    for folder in (tmp_path / "models--a--b/snapshots/123", tmp_path / "models--a--b/snapshots/123/unet"):
        (tmp_path / "models--a--b/blobs").mkdir(parents=True, exist_ok=True)
        folder.mkdir(parents=True)
        blob = tmp_path / "models--a--b/blobs/e3b0c442"
        blob.write_bytes((sharded / "shard.safetensors").read_bytes())
        link = folder / "shard.safetensors"
        link.symlink_to(os.path.relpath(blob, folder))
        index(folder, {"weight_map": {"x": "shard.safetensors"}})
        assert Tensors(folder)["x"].shape == (3,)
        link.unlink()
        link.symlink_to(tmp_path / "outside.safetensors")
        check(error_of(folder), "a link to a file outside its directory")


# ---- PyTorch files: bad files ----------------------------------------------------------------------------------------

BAD_TENSORS = {
    "sparse": (lambda t: t.eye(3).to_sparse(), "x is a sparse tensor"),
    "csr": (lambda t: t.eye(3).to_sparse_csr(), "x is a sparse tensor"),
    "meta": (lambda t: t.empty(3, device="meta"), "x is a meta tensor, which has no data"),
    "nested": (lambda t: t.nested.nested_tensor([t.ones(2), t.ones(3)]), "x is a nested tensor"),
    "jagged": (lambda t: t.nested.nested_tensor([t.ones(2), t.ones(3)], layout=t.jagged), "x is a nested tensor"),
    "quantized": (lambda t: t.quantize_per_tensor(t.ones(3), 0.1, 0, t.qint8), "x is a quantized tensor"),
    "fp8": (lambda t: t.ones(3).to(t.float8_e4m3fn), "x has the dtype float8_e4m3fn, which is not supported"),
    "complex": (lambda t: t.ones(3, dtype=t.complex64), "x has the dtype complex64, which is not supported"),
    "bits": (lambda t: t.zeros(3, dtype=t.uint8).view(t.bits8), "x has the dtype bits8, which is not supported"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
@pytest.mark.filterwarnings("ignore")
def test_torch_tensors_that_numpy_cannot_hold_are_refused(case, torch, tmp_path):
    make, match = BAD_TENSORS[case]
    torch.save({"fine": torch.ones(2), "x": make(torch)}, tmp_path / "model.bin")
    message = error_of(tmp_path)
    assert str(tmp_path / "model.bin") in message
    check(message, match)


def test_torch_keys_that_are_not_strings_are_refused(torch, tmp_path):
    for key in (3, ("a", "b"), None, 1.5):
        torch.save({"fine": torch.ones(2), key: torch.ones(2)}, tmp_path / "model.bin")
        message = error_of(tmp_path)
        assert "model.bin: the tensor name " in message and f"{key!r} is not a string" in message


def test_torch_files_of_other_things_are_refused(torch, tmp_path):
    file = tmp_path / "model.bin"
    for content, match in (
        ([torch.ones(2)], "contains a list instead of a dict of tensors"),
        (3, "contains a int instead of a dict of tensors"),
        ({"x": 3, "y": torch.ones(2)}, "contains something that is not a tensor: x"),
        ({"model": {"x": torch.ones(2)}}, "contains something that is not a tensor: model"),
        ({"state_dict": [1]}, "contains something that is not a tensor: state_dict"),
        (
            {"x": np.ones(2)},
            r"is refused: it contains objects other than tensors \(numpy.*_reconstruct\) and could exec",
        ),
    ):
        torch.save(content, file)
        check(error_of(file), f"model.bin {match}")


def test_damaged_torch_files_are_refused(torch, tmp_path):
    file = tmp_path / "model.bin"
    for new in (True, False):
        torch.save({"x": torch.arange(8.0), "y": torch.ones(2)}, file, _use_new_zipfile_serialization=new)
        whole = file.read_bytes()
        for length in [0, 1, 2, 10, 100, *range(200, len(whole), 97)]:
            file.write_bytes(whole[:length])
            # a cut inside the name of an allowed object gives the name of an object that is not allowed
            check(error_of(file), r"model.bin is (truncated or corrupt: .|refused: .*\(\S+\) and could execute code)")
    for content in (b"PK\x03\x04 not an archive", b"\x80\x02", b"a,b\n1,2\n", b"{}"):
        file.write_bytes(content)
        check(error_of(file), "model.bin is truncated or corrupt: .")


class Executes:
    def __reduce__(self):
        return (print, ("code was executed",))


def test_a_pickle_that_executes_code_is_refused(torch, tmp_path, capsys):
    torch.save({"x": torch.ones(2), "y": Executes()}, tmp_path / "model.bin")
    check(error_of(tmp_path), r"model.bin is refused: .*\((builtins\.)?print\) and could execute code")
    (tmp_path / "model.bin").write_bytes(pickle.dumps(Executes()))
    check(error_of(tmp_path), "model.bin is refused: .*could execute code")
    assert "code was executed" not in capsys.readouterr().out


def test_without_torch_the_requirement_is_named(tmp_path, monkeypatch):
    (tmp_path / "model.bin").write_bytes(b"PK")
    monkeypatch.setitem(sys.modules, "torch", None)
    check(error_of(tmp_path), r"model.bin: PyTorch files require torch, which is not installed \(pip install torch\)")
