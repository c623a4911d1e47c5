"""An object store whose requests take 20 ms: images/s and requests of sources, and of records.

python -m benchmarks.object_store

512 generated JPEG images as files, in two tars, and in Parquet files, on the server of `tests/object_store.py` (needs
`pip install gcsfs`). "in turn": each of the pipeline's threads reads the rows of its batch one after another, as from
a local disk. Then 2,048 records in 8 blocks, read in random order by two runs: with a cache that holds them, and with
one that holds half of them.
"""

import io
import json
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.faults.records import write_records
from unimm_jax import process, storage
from unimm_jax.data import pipeline
from unimm_jax.data.records import Records
from unimm_jax.data.sources import DecodedDataset, open_source

IMAGES, BATCH, SIZE, SECONDS = 512, 32, 64, 0.02
RECORDS, BLOCKS = 2048, 8
SERVER = pathlib.Path(__file__).parent.parent / "tests" / "object_store.py"


def write(folder: pathlib.Path) -> None:
    """Writes the same images in three formats."""
    rng = np.random.default_rng(0)
    for name in ("files", "tars", "parquet"):
        (folder / name).mkdir()
    names, images = [f"{i:04d}" for i in range(IMAGES)], []
    for name in names:
        buffer = io.BytesIO()
        small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        small.resize((256, 256), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        images.append(buffer.getvalue())
        (folder / "files" / f"{name}.jpg").write_bytes(images[-1])
        (folder / "files" / f"{name}.txt").write_text(f"image {name}")
    for number in range(2):
        with tarfile.open(folder / "tars" / f"{number}.tar", "w") as tar:
            for name in names[number::2]:
                for suffix in ("jpg", "txt"):
                    tar.add(folder / "files" / f"{name}.{suffix}", f"{name}.{suffix}")
    table = pa.table({"image": images, "text": [f"image {name}" for name in names]})
    pq.write_table(table, folder / "parquet" / "0.parquet", row_group_size=8)


def ask(url: str, **wanted: Any) -> int:
    """Sets what the server does; the number of requests so far."""
    with urllib.request.urlopen(f"{url}/faults", json.dumps(wanted).encode()) as reply:
        return int(json.load(reply)["requests"])


def measure(description: str, url: str, is_remote: bool) -> tuple[float, float]:
    """(images per second, requests per image) of one pass in random order."""
    dataset = DecodedDataset(open_source(description, held_out=0.0), SIZE)
    dataset._cache = None  # as of a data set that does not fit in memory
    rows = pipeline.ImageRows([dataset], 0, BATCH, IMAGES // BATCH, lambda item, _: {"images": item.pixels[0]})
    rows.is_remote = is_remote
    before, began = ask(url, seconds=SECONDS), time.perf_counter()
    batches = pipeline.Input(rows).iterate()
    count = sum(len(batch["images"]) for batch in batches)
    took = time.perf_counter() - began
    return count / took, (ask(url) - before) / IMAGES


def measure_records(url: str, share: float) -> list[str]:
    """Reads all records in random order, twice from the start, with a cache of a share of their size; what it took."""
    place = storage.path("gs://bucket/records")
    blocks = storage.total_size(place / "blocks")
    with tempfile.TemporaryDirectory() as cache:
        os.environ |= {"UNIMM_CACHE_DIR": cache, "UNIMM_CACHE_GIB": str(share * blocks / 2**30)}
        rng, found = np.random.default_rng(0), []
        for _ in range(2):
            stored = Records(place)  # keeps what it has read of so few records in memory
            before, began = ask(url, seconds=SECONDS), time.perf_counter()
            for index in rng.permutation(len(stored)).tolist():
                stored[index]
            took, requests = time.perf_counter() - began, ask(url) - before
            found.append(f"{len(stored) / took:.0f} records/s, {requests} requests")
    return found


def main() -> None:
    """Starts the server and prints a line per format."""
    port = 19023
    server = subprocess.Popen([sys.executable, str(SERVER), str(port)], stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    os.environ |= {"STORAGE_EMULATOR_HOST": url, "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
    try:
        with tempfile.TemporaryDirectory() as folder:
            time.sleep(1.0)
            write(pathlib.Path(folder))
            storage.upload_tree(pathlib.Path(folder), storage.path("gs://bucket/data"))
        for kind, name in (("folder", "files"), ("webdataset", "tars"), ("parquet", "parquet")):
            description = f"{kind}:gs://bucket/data/{name}"
            found = [measure(description, url, is_remote) for is_remote in (False, True)]
            print(
                f"{kind}: {found[1][1]:.2f} requests per image; {found[0][0]:.0f} images/s in turn, {found[1][0]:.0f} "
                f"images/s with {pipeline.REMOTE_THREADS} threads",
                flush=True,
            )
        write_records(storage.path("gs://bucket/records"), RECORDS, BLOCKS)
        for share in (2.0, 0.5):
            print(f"records, cache of {share:g} times their size: {'; '.join(measure_records(url, share))}", flush=True)
    finally:
        server.kill()


if __name__ == "__main__":
    process.prepare()
    main()
