"""Where runs have their workdirs and records: a small disk that can be full, and an object store that can fail."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import time
import urllib.request

from benchmarks.claims.stages import ROOT
from benchmarks.faults.records import write_records
from benchmarks.faults.stage import free_port
from unimm_jax import storage

COUNT, BLOCKS, HELD_OUT = 320, 4, 32  # records and blocks for training, and held-out records
DISK_BYTES = 64 * 2**20
BUCKET = "gs://bucket"


class Disk:
    """A small file system in memory, or a directory where this user cannot mount one.

    Args (constructor):
      folder: where it is mounted.

    Attributes:
      refusal: why it is a directory of another file system, which cannot be filled; empty if it is mounted.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder, self.refusal = folder, ""
        folder.mkdir(parents=True, exist_ok=True)
        self.close()  # of a campaign that was killed
        line = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
        try:
            done = subprocess.run(line, capture_output=True, text=True)
            self.refusal = done.stderr.strip() if done.returncode else ""
        except FileNotFoundError as error:
            self.refusal = str(error)

    def fill(self, left: int) -> None:
        """Fills the disk but for so many bytes."""
        with (self.folder / "filler").open("wb", buffering=0) as file:
            for chunk in (2**20, 4096):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(bytes(chunk))
            file.truncate(max(file.tell() - left, 0))

    def free(self) -> None:
        """Frees what `fill` took."""
        (self.folder / "filler").unlink(missing_ok=True)

    def close(self) -> None:
        """Unmounts the file system."""
        if self.folder.is_mount():
            subprocess.run(["umount", "-l", str(self.folder)], check=True)


class Server:
    """The object store of the tests as a process that can be killed; what it holds is kept in a file.

    Args (constructor):
      file: what it holds.
    """

    def __init__(self, file: pathlib.Path):
        self.file, self.port = file, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        names = ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL", "GOOGLE_AUTH_TOKEN_FOR_TESTING")
        os.environ.update(zip(names, (self.url, self.url, "x"), strict=True))
        os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # gcsfs asks Google for the type of each bucket
        self.start()

    def start(self) -> None:
        """Starts the server and waits until it answers."""
        line = [sys.executable, str(ROOT / "tests" / "object_store.py"), str(self.port), str(self.file)]
        self.process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{self.url}/storage/v1/b/bucket").close()
                return
            except OSError:
                time.sleep(0.1)
        raise RuntimeError("the object store of the tests does not answer")

    def kill(self) -> None:
        """Ends the server."""
        self.process.kill()
        self.process.wait()

    def fail(self, share: float, seed: int = 0) -> int:
        """Makes so large a share of the requests fail: 429, 503, or a cut connection; how many have failed so far."""
        return self._faults(json.dumps({"share": share, "seed": seed}).encode())

    def failed(self) -> int:
        """How many requests have failed."""
        return self._faults()

    def _faults(self, data: bytes | None = None) -> int:
        with urllib.request.urlopen(f"{self.url}/faults", data) as reply:
            failed: int = json.load(reply)["failed"]
        return failed


class Places:
    """The disk and the object store of a campaign, both with the same records.

    Args (constructor):
      folder: of the campaign.
    """

    def __init__(self, folder: pathlib.Path):
        local = folder / "records"
        if not (local / "test" / "header.json").exists():
            write_records(local, COUNT, BLOCKS)
            write_records(local / "test", HELD_OUT)
        self.disk = Disk(folder / "disk")
        (folder / "store").unlink(missing_ok=True)
        self.server = Server(folder / "store")
        self.records = {"disk": local, "store": storage.path(f"{BUCKET}/records")}
        storage.upload_tree(local, self.records["store"])

    def workdir(self, place: str, name: str) -> pathlib.Path:
        """The path of a new workdir."""
        return storage.path(f"{BUCKET}/{name}") if place == "store" else self.disk.folder / name

    def close(self) -> None:
        """Ends the server and unmounts the disk."""
        self.server.kill()
        self.disk.close()
