"""Tensor files, read one tensor at a time: safetensors (single or sharded with an index) and PyTorch `.bin`.

Nothing here holds a whole model: names and shapes come from headers, tensors from memory-mapped files.
"""

import json
import mmap
import pathlib
import struct
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import ml_dtypes
import numpy as np

DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
CODES = {np.dtype(v): k for k, v in DTYPES.items()}
SHARD_BYTES = 5 * 2**30


class BadFile(ValueError):
    """A file that cannot be read; the message names it and, where one is to blame, the tensor."""


class Tensors:
    """Names, shapes and tensors of one or several files.

    Args (constructor):
      source: a safetensors file, a `.bin` file, or a directory that holds either (with its index where there is one).

    Raises (constructor):
      BadFile: no such file, a truncated or corrupt one, a shard that the index names and that is missing.
    """

    def __init__(self, source: str | pathlib.Path):
        self.files = find_files(pathlib.Path(source))
        self._readers: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in self.files:
            reader = _Safetensors(file) if file.suffix == ".safetensors" else _Pickle(file)
            for name, shape in reader.shapes().items():
                if name in self.shapes:
                    raise BadFile(f"{name} is in {file.name} and in an earlier file of {source}")
                self.shapes[name], self._readers[name] = shape, reader

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def __getitem__(self, name: str) -> np.ndarray:
        """The tensor, in the file's dtype; a view of the memory-mapped file where that is possible."""
        return self._readers[name].read(name)

    def dtype(self, name: str) -> np.dtype:
        """The dtype that a tensor is stored in."""
        return self._readers[name].dtype(name)


def find_files(source: pathlib.Path) -> list[pathlib.Path]:
    """The tensor files of a source; safetensors before `.bin` where a directory holds both.

    Raises:
      BadFile: nothing there, or an index that names files that are missing.
    """
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise BadFile(f"there is no file or directory {source}")
    for suffix in ("safetensors", "bin"):
        indices = sorted(source.glob(f"*.{suffix}.index.json"))
        if indices:
            try:
                names = sorted(set(json.loads(indices[0].read_text())["weight_map"].values()))
            except (ValueError, KeyError, AttributeError) as error:
                raise BadFile(f"{indices[0]} is not a weight index: {error}") from None
            missing = [n for n in names if not (source / n).exists()]
            if missing:
                raise BadFile(f"{indices[0].name} names files that are not in {source}: {', '.join(missing)}")
            return [source / n for n in names]
        found = sorted(source.glob(f"*.{suffix}"))
        if found:
            return found
    raise BadFile(f"{source} holds no .safetensors and no .bin file")


class _Safetensors:
    """One safetensors file: an 8-byte length, a JSON header, then the tensors."""

    def __init__(self, file: pathlib.Path):
        self.file, size = file, file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
            if 8 + length > size:
                raise BadFile(f"{file} is truncated: its header does not fit")
            try:
                header = json.loads(stream.read(length))
                self.entries = {k: v for k, v in header.items() if k != "__metadata__"}
                for name, entry in self.entries.items():
                    begin, end = entry["data_offsets"]
                    if entry["dtype"] not in DTYPES:
                        raise BadFile(f"{file}: {name} has the dtype {entry['dtype']}, which is not supported")
                    bytes_wanted = (
                        int(np.prod(entry["shape"], dtype=np.int64)) * np.dtype(DTYPES[entry["dtype"]]).itemsize
                    )
                    if 8 + length + end > size:
                        raise BadFile(f"{file} is truncated: {name} ends beyond the file")
                    if end - begin != bytes_wanted:
                        raise BadFile(f"{file} is corrupt: {name} has {end - begin} bytes, its shape {bytes_wanted}")
            except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
                raise BadFile(f"{file} is corrupt: its header cannot be read ({error})") from None
            self.start = 8 + length
            self.map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) if size else b""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(entry["shape"]) for name, entry in self.entries.items()}

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(DTYPES[self.entries[name]["dtype"]])

    def read(self, name: str) -> np.ndarray:
        entry = self.entries[name]
        count = int(np.prod(entry["shape"], dtype=np.int64))
        flat = np.frombuffer(self.map, self.dtype(name), count, self.start + entry["data_offsets"][0])
        return flat.reshape(entry["shape"])


class _Pickle:
    """One PyTorch file, read by torch with `weights_only=True`: a pickle that would run code is refused."""

    def __init__(self, file: pathlib.Path):
        try:
            import torch
        except ImportError:
            raise BadFile(f"{file}: .bin files are read by torch, which is not installed (pip install torch)") from None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of pickle protocols
                try:
                    found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
                except RuntimeError as error:
                    if "mmap can only be used" not in str(error):
                        raise
                    found = torch.load(file, map_location="cpu", weights_only=True)  # the format before PyTorch 1.6
        except Exception as error:  # whatever a damaged archive makes torch raise
            text = str(error)
            if "weights_only" in text.lower() or "Unsupported" in text or "GLOBAL" in text:
                raise BadFile(
                    f"{file} is refused: it holds more than tensors and would execute code when loaded"
                ) from None
            raise BadFile(
                f"{file} is truncated or corrupt: {text.splitlines()[0] if text else type(error).__name__}"
            ) from None
        if isinstance(found, torch.Tensor):
            found = {"<tensor>": found}
        found = found.get("state_dict", found) if isinstance(found, dict) else found
        wrong = [] if isinstance(found, dict) else ["the whole file"]
        wrong = wrong or [str(k) for k, v in found.items() if not isinstance(v, torch.Tensor)]
        if wrong:
            raise BadFile(f"{file} holds something that is not a tensor: {', '.join(wrong[:5])}")
        self.tensors, self.torch = found, torch

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def dtype(self, name: str) -> np.dtype:
        tensor = self.tensors[name]
        if tensor.dtype == self.torch.bfloat16:
            return np.dtype(ml_dtypes.bfloat16)
        return np.dtype(str(tensor.dtype).removeprefix("torch."))

    def read(self, name: str) -> np.ndarray:
        tensor = self.tensors[name].detach().contiguous()
        if tensor.dtype == self.torch.bfloat16:
            return tensor.view(self.torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()


def write_safetensors(
    folder: pathlib.Path,
    stem: str,
    shapes: dict[str, tuple[int, ...]],
    dtype: np.dtype,
    tensors: Iterable[tuple[str, np.ndarray]],
) -> Iterator[str]:
    """Writes tensors, one in memory at a time, to shards of at most `SHARD_BYTES`; yields each name when written.

    Args:
      stem: "model" or "diffusion_pytorch_model"; several shards get Hugging Face's numbering and an index.
      shapes: of everything that `tensors` will give, in the same order.
    """
    size = np.dtype(dtype).itemsize
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    used = 0
    for name, shape in shapes.items():
        need = int(np.prod(shape, dtype=np.int64)) * size
        if shards[-1] and used + need > SHARD_BYTES:
            shards.append({})
            used = 0
        shards[-1][name] = shape
        used += need
    count = len(shards)
    files = (
        [f"{stem}.safetensors"]
        if count == 1
        else [f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    )
    source = iter(tensors)
    total = 0
    for file, shard in zip(files, shards, strict=True):
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name, shape in shard.items():
            need = int(np.prod(shape, dtype=np.int64)) * size
            header[name] = {"dtype": CODES[np.dtype(dtype)], "shape": list(shape), "data_offsets": [at, at + need]}
            at += need
        body = json.dumps(header, separators=(",", ":")).encode()
        body += b" " * (-len(body) % 8)
        with (folder / file).open("wb") as stream:
            stream.write(struct.pack("<Q", len(body)) + body)
            for wanted in shard:
                name, array = next(source)
                if name != wanted or tuple(array.shape) != tuple(shard[wanted]):
                    raise ValueError(f"{name} {array.shape} was given where {wanted} {shard[wanted]} was due")
                stream.write(np.ascontiguousarray(array, dtype).view(np.uint8).reshape(-1).data)
                yield name
        total += at
    if count > 1:
        where = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1))
