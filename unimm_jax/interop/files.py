"""Reads and writes tensor files one tensor at a time: safetensors (single or sharded with an index) and PyTorch `.bin`.

No function here holds a whole model in memory: names and shapes come from headers, tensors from memory-mapped files.
Files on an object store are copied to the cache first.
Files may come from strangers, so their content is checked before use. A bad file raises `WeightsFileError`, whose
message is one line that names the file and, if known, the tensor.
"""

import json
import math
import mmap
import pathlib
import re
import reprlib
import struct
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from unimm_jax import storage
from unimm_jax.errors import WeightsFileError

# Name of a dtype in a safetensors header -> NumPy dtype. Tensors of other dtypes are rejected in every format.
DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
SHARD_BYTES = 5 * 2**30
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format


class Tensors:
    """Names, shapes and tensors of one or several files.

    Args (constructor):
      source: a safetensors file, a `.bin` file, or a directory that contains either, with or without an index.

    Attributes:
      files: the files that are read.
      shapes: shape of every tensor by name.

    Raises (constructor):
      WeightsFileError: a file is missing, truncated, corrupt or holds something other than supported tensors.
    """

    def __init__(self, source: str | pathlib.Path):
        self.files = find_files(storage.path(source))
        self._readers: dict[str, _Reader] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in self.files:
            reader = _open(file)
            for name, shape in reader.shapes().items():
                if name in self.shapes:
                    raise WeightsFileError(f"{_label(name)} is in {file.name} and in an earlier file of {source}")
                self.shapes[name], self._readers[name] = shape, reader

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def __getitem__(self, name: str) -> np.ndarray:
        """Returns the tensor in the dtype of its file: a read-only view of the memory-mapped file where possible."""
        return self._readers[name].read(name)

    def dtype(self, name: str) -> np.dtype:
        """Returns the dtype in which a tensor is stored."""
        return self._readers[name].dtype(name)


def find_files(source: pathlib.Path) -> list[pathlib.Path]:
    """Lists the tensor files of a file or directory. Prefers safetensors if a directory contains both formats.

    Variants such as `model.fp16.safetensors` are left out beside `model.safetensors`.

    Raises:
      WeightsFileError: there are no tensor files, or an index is invalid or names files that are missing.
    """
    try:
        if source.is_file():
            return [source]
        if not source.is_dir():
            raise WeightsFileError(f"there is no file or directory {source}")
        for suffix in ("safetensors", "bin"):
            indices = sorted(source.glob(f"*.{suffix}.index.json"))
            if indices:
                return _read_index(indices[0])
            found = sorted(source.glob(f"*.{suffix}"))
            plain = {file.name for file in found if file.name.count(".") == 1}
            found = [file for file in found if file.name in plain or f"{file.name.split('.')[0]}.{suffix}" not in plain]
            if found:
                return found
    except (OSError, ValueError) as error:  # no permission; a path too long or with a null byte
        raise WeightsFileError(f"{source} cannot be read: {_reason(error)}") from None
    raise WeightsFileError(f"{source} contains no .safetensors and no .bin file")


def write_safetensors(
    folder: pathlib.Path,
    stem: str,
    shapes: dict[str, tuple[int, ...]],
    dtype: np.dtype,
    tensors: Iterable[tuple[str, np.ndarray]],
) -> Iterator[str]:
    """Writes tensors to shards of at most `SHARD_BYTES` and yields each name when it is written.

    The `safetensors` library serializes only tensors that are all in memory at once. This function keeps one in memory:
    it writes the header from `shapes`, then each tensor as it arrives.

    Args:
      stem: "model" or "diffusion_pytorch_model". Several shards get the numbering of Hugging Face and an index.
      shapes: shapes of all tensors, in the order in which `tensors` yields them.
      dtype: the dtype to which all tensors are converted.

    Raises:
      ValueError: `tensors` does not match `shapes`.
    """
    dtype = np.dtype(dtype)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    used = 0
    for name, shape in shapes.items():
        need = math.prod(shape) * dtype.itemsize
        if shards[-1] and used + need > SHARD_BYTES:
            shards.append({})
            used = 0
        shards[-1][name] = shape
        used += need
    count = len(shards)
    files = [f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    if count == 1:
        files = [f"{stem}.safetensors"]
    source = iter(tensors)
    total = 0
    for file, shard in zip(files, shards, strict=True):
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in shard.items():
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        body = json.dumps(header, separators=(",", ":")).encode()
        body += b" " * (-len(body) % 8)
        with (folder / file).open("wb") as stream:
            stream.write(struct.pack("<Q", len(body)) + body)
            for expected, shape in shard.items():
                name, array = next(source, ("nothing", np.empty(0)))
                if name != expected or tuple(array.shape) != tuple(shape):
                    raise ValueError(f"expected the tensor {expected} {tuple(shape)}, got {name} {array.shape}")
                stream.write(np.ascontiguousarray(array, dtype).reshape(-1).view(np.uint8).data)
                yield name
        total += end
    if count > 1:
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


# ---- Index files -----------------------------------------------------------------------------------------------------


def _read_index(index: pathlib.Path) -> list[pathlib.Path]:
    """Returns the files that an index names. All of them must exist in the directory of the index."""
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except OSError as error:
        raise WeightsFileError(f"{index} cannot be read: {_reason(error)}") from None
    except (ValueError, RecursionError) as error:
        raise WeightsFileError(f"{index} is not a weight index: invalid JSON ({_reason(error)})") from None
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict):
        raise WeightsFileError(f'{index} is not a weight index: "weight_map" must map tensor names to file names')
    if not weight_map:
        raise WeightsFileError(f"{index} is empty: its weight_map lists no tensors")
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            raise WeightsFileError(f"{index}: the file of {_label(tensor)} is {_label(name)}, which is not a file name")
    names = sorted(set(weight_map.values()))
    for name in names:
        if pathlib.PurePath(name).is_absolute() or ".." in pathlib.PurePath(name).parts:
            raise WeightsFileError(f"{index} names {_label(name)}, which is outside its directory")
    missing = [_label(name) for name in names if not _is_file(index.parent / name)]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise WeightsFileError(
            f"{index.name} names files that are not in {index.parent}: {', '.join(missing[:5])}{more}"
        )
    for name in names:
        if not _stays_inside(index.parent, index.parent / name):
            raise WeightsFileError(
                f"{index} names {_label(name)}, a link to a file outside its directory; replace the link with the file"
            )
    return [index.parent / name for name in names]


def _is_file(path: pathlib.Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long or with a null byte
        return False


def _stays_inside(folder: pathlib.Path, file: pathlib.Path) -> bool:
    """Whether a file, after links are followed, is in the folder.

    Also true for links of Hugging Face's download cache, from `snapshots/<revision>/<file>` to `blobs/<hash>`.
    """
    if storage.is_remote(file):  # stores have no links
        return True
    folder, file = folder.resolve(), file.resolve()
    allowed = [folder] + [p.parent / "blobs" for p in folder.parents if p.name == "snapshots"]
    return any(file.is_relative_to(root) for root in allowed)


# ---- Formats ---------------------------------------------------------------------------------------------------------


class _Reader(Protocol):
    """One open file."""

    def shapes(self) -> dict[str, tuple[int, ...]]: ...

    def dtype(self, name: str) -> np.dtype: ...

    def read(self, name: str) -> np.ndarray: ...


def _open(file: pathlib.Path) -> _Reader:
    """Opens a file by its suffix; any suffix but `.safetensors` is read as a PyTorch file."""
    try:
        copy = storage.local_file(file)
        start = storage.read(copy, 0, 64)
    except OSError as error:
        raise WeightsFileError(f"{file} cannot be read: {_reason(error)}") from None
    if start.startswith(b"version https://git-lfs"):
        raise WeightsFileError(
            f"{file} is a Git LFS pointer without the weights; download the file with `git lfs pull`"
        )
    try:
        return _SafetensorsReader(copy) if file.suffix == ".safetensors" else _TorchReader(copy)
    except WeightsFileError as error:
        raise WeightsFileError(str(error).replace(str(copy), str(file))) from None


class _SafetensorsReader:
    """One safetensors file: the length of the header in 8 bytes, a JSON header, then the data of the tensors.

    The `safetensors` library validates the header: every tensor has the bytes that its shape needs, and the tensors in
    the order of their offsets cover the data without gap or overlap. So the position of each tensor follows from the
    shapes and dtypes that the library reports, and the tensors here are views of the memory-mapped file. (The library
    itself copies each tensor.) The library ignores repeated names; they are rejected here.
    """

    def __init__(self, file: pathlib.Path):
        header, start, size = _read_header(file)
        try:
            with safe_open(file, framework="np") as opened:
                parts = {name: opened.get_slice(name) for name in opened.offset_keys()}
                stored = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()}
        except SafetensorError as error:
            raise WeightsFileError(_diagnose(file, header, size - start, _reason(error))) from None
        except OSError as error:
            raise WeightsFileError(f"{file} cannot be read: {_reason(error)}") from None
        with file.open("rb") as stream:
            data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        self.tensors: dict[str, np.ndarray] = {}
        for name, (code, shape) in stored.items():
            dtype = _check_dtype(file, name, code)
            try:
                self.tensors[name] = np.ndarray(shape, dtype, data, start)
            except (ValueError, OverflowError, TypeError) as error:  # a shape that NumPy cannot represent
                raise WeightsFileError(f"{file}: {_label(name)} cannot be read: {_reason(error)}") from None
            start += self.tensors[name].nbytes
        if start != size or len(data) != size:
            raise WeightsFileError(f"{file} is corrupt: its tensors end at byte {start}, the file at byte {size}")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def dtype(self, name: str) -> np.dtype:
        return self.tensors[name].dtype

    def read(self, name: str) -> np.ndarray:
        return self.tensors[name]


def _read_header(file: pathlib.Path) -> tuple[dict[str, Any], int, int]:
    """Returns the parsed header of a safetensors file, the position of its data and the size of the file in bytes."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            name = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise WeightsFileError(f"{file} is corrupt: {_label(name)} occurs more than once in its header")
        return found

    with file.open("rb") as stream:
        size = stream.seek(0, 2)
        stream.seek(0)
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if 8 + length > size:
            raise WeightsFileError(f"{file} is truncated: its header does not fit, or it is not a safetensors file")
        if length > MAX_HEADER_BYTES:
            raise WeightsFileError(f"{file} is corrupt: its header is larger than {MAX_HEADER_BYTES} bytes")
        content = stream.read(length)
    try:
        header = json.loads(content.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise WeightsFileError(f"{file} is corrupt: its header cannot be read ({_reason(error)})") from None
    if not isinstance(header, dict):
        raise WeightsFileError(f"{file} is corrupt: its header cannot be read (it is not a JSON object)")
    return header, 8 + length, size


def _diagnose(file: pathlib.Path, header: dict[str, Any], data_size: int, reason: str) -> str:
    """Explains why the library rejects a file. The library often omits the tensor; here the first wrong one is named.

    Args:
      data_size: bytes after the header.
      reason: message of the library, used if no wrong tensor is found.
    """
    spans = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        label = _label(name)
        if not isinstance(entry, dict) or not entry.keys() >= {"dtype", "shape", "data_offsets"}:
            return f"{file} is corrupt: {label} has no dtype, no shape or no data_offsets in the header"
        code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(code, str) or code not in DTYPES:
            return _unsupported_dtype(file, name, code)
        if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            shown = f"shape {_label(shape)} or data_offsets {_label(offsets)}"
            return f"{file} is corrupt: {label} has an invalid {shown}"
        begin, end = offsets
        if math.prod(shape) * DTYPES[code].itemsize != end - begin:
            shown = f"shape {_label(shape)} and dtype {code}"
            return f"{file} is corrupt: {label} has {end - begin} bytes, which does not match its {shown}"
        spans.append((begin, end, label))
    position = 0
    for begin, end, label in sorted(spans):
        if begin != position:
            return (
                f"{file} is corrupt: {label} starts at data byte {begin}, but the tensor before it ends at {position}"
            )
        if end > data_size:
            return f"{file} is truncated: {label} ends beyond the file"
        position = end
    if position != data_size:
        return f"{file} is corrupt: {data_size - position} bytes follow the last tensor"
    return f"{file} is corrupt: {reason}"


def _are_counts(values: Any) -> bool:
    """Whether a JSON value is a list of at most 64 integers from 0 to 2^63 - 1."""
    return isinstance(values, list) and len(values) <= 64 and all(type(v) is int and 0 <= v < 2**63 for v in values)


class _TorchReader:
    """One PyTorch file, read by `torch.load` with `weights_only=True`, which does not execute code from the file."""

    def __init__(self, file: pathlib.Path):
        try:
            import torch
        except ImportError:
            raise WeightsFileError(
                f"{file}: PyTorch files require torch, which is not installed (pip install torch)"
            ) from None
        self.torch = torch
        found = self._load(file)
        if isinstance(found, torch.Tensor):
            found = {"<tensor>": found}
        if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
            found = found["state_dict"]
        if not isinstance(found, dict):
            raise WeightsFileError(f"{file} contains a {type(found).__name__} instead of a dict of tensors")
        others = [_label(key) for key, value in found.items() if not isinstance(value, torch.Tensor)]
        if others:
            raise WeightsFileError(f"{file} contains something that is not a tensor: {', '.join(others[:5])}")
        self.dtypes = {name: self._check(file, name, tensor) for name, tensor in found.items()}
        self.tensors = found

    def _load(self, file: pathlib.Path) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about old formats
                try:
                    return self.torch.load(file, map_location="cpu", weights_only=True, mmap=True)
                except RuntimeError as error:
                    if "mmap can only be used" not in str(error):
                        raise
                    # The format before PyTorch 1.6, which cannot be memory-mapped.
                    return self.torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises errors of many types for damaged files
            found = re.search(r"GLOBAL (\S+)", str(error))
            if found or ("Unsupported operand" in str(error) and _is_pickle(file)):
                objects = f"objects other than tensors ({_label(found[1])})" if found else "objects other than tensors"
                raise WeightsFileError(
                    f"{file} is refused: it contains {objects} and could execute code when loaded"
                ) from None
            raise WeightsFileError(f"{file} is truncated or corrupt: {_reason(error)}") from None

    def _check(self, file: pathlib.Path, name: Any, tensor: Any) -> np.dtype:
        """Returns the NumPy dtype of a tensor; raises `WeightsFileError` if NumPy cannot represent the tensor."""
        if not isinstance(name, str):
            raise WeightsFileError(f"{file}: the tensor name {_label(name)} is not a string")
        kinds = {
            "a nested tensor": tensor.is_nested,
            "a quantized tensor": tensor.is_quantized,
            "a sparse tensor": tensor.layout != self.torch.strided,
            "a meta tensor, which has no data": tensor.is_meta,
        }
        for kind, found in kinds.items():
            if found:
                raise WeightsFileError(
                    f"{file}: {_label(name)} is {kind}; save it as a dense tensor of a standard dtype"
                )
        torch_name = str(tensor.dtype).removeprefix("torch.")
        return _check_dtype(file, name, next((code for code, d in DTYPES.items() if d.name == torch_name), torch_name))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def dtype(self, name: str) -> np.dtype:
        return self.dtypes[name]

    def read(self, name: str) -> np.ndarray:
        tensor = self.tensors[name].detach().resolve_neg().contiguous()
        if tensor.dtype == self.torch.bfloat16:
            return tensor.view(self.torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()


def _is_pickle(file: pathlib.Path) -> bool:
    """Whether a file starts like a plain pickle. One that torch did not write has opcodes that torch does not read."""
    with file.open("rb") as stream:
        return stream.read(1) == b"\x80"


# ---- Messages --------------------------------------------------------------------------------------------------------


def _check_dtype(file: pathlib.Path, name: str, code: str) -> np.dtype:
    if code not in DTYPES:
        raise WeightsFileError(_unsupported_dtype(file, name, code))
    return DTYPES[code]


def _unsupported_dtype(file: pathlib.Path, name: str, code: Any) -> str:
    return f"{file}: {_label(name)} has the dtype {_label(code)}, which is not supported"


def _label(value: Any) -> str:
    """Text of a value from a file, on one line and of limited length."""
    if isinstance(value, str):
        text = value if value.isprintable() else repr(value)
    else:
        text = reprlib.repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _reason(error: Exception) -> str:
    """The message of an exception of a library, on one line and of limited length."""
    text = error.strerror if isinstance(error, OSError) else None
    text = text or str(error) or type(error).__name__
    # torch puts advice about weights_only=False before the reason
    text = text.split("WeightsUnpickler error:")[-1].removeprefix("Error while deserializing header: ")
    lines = text.strip().splitlines()
    return _label(lines[0] if lines else type(error).__name__)
