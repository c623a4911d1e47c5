"""Files of self-enhancement: whole writes, and headers that say what a directory belongs to."""

import hashlib
import json
import pathlib
import time
from typing import Any

import jax
import numpy as np

from unimm_jax import storage
from unimm_jax.errors import DataError

HEADER = "header.json"


def read_header(folder: pathlib.Path, remedy: str) -> dict[str, Any]:
    """The header of a directory.

    Args:
      remedy: what to do if there is none.

    Raises:
      DataError: there is none, or it is damaged.
    """
    try:
        found = json.loads(storage.read(folder / HEADER))
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{folder} has no {HEADER}; {remedy}") from None
    except ValueError as error:
        raise DataError(f"{folder / HEADER} is damaged ({error}); {remedy}") from None
    if not isinstance(found, dict):
        raise DataError(f"{folder / HEADER} is damaged; {remedy}")
    return found


def claim(folder: pathlib.Path, identity: dict[str, Any], what: str, is_empty: bool = False) -> None:
    """Writes the header of a directory, or checks that the one that is there is the same.

    Args:
      identity: JSON-compatible description of what the directory holds.
      what: is in the directory, for messages.
      is_empty: the directory has a header only, which is replaced.

    Raises:
      DataError: the directory holds something else.
    """
    wanted = json.loads(json.dumps(identity))
    if storage.kind(folder / HEADER) and not is_empty:
        found = read_header(folder, "remove the directory or give another --output")
        if differing := [key for key in {**wanted, **found} if wanted.get(key) != found.get(key)]:
            raise DataError(
                f"{folder} holds {what} of another run ({', '.join(differing)} differ); remove it or give another "
                "--output"
            )
    else:
        folder.mkdir(parents=True, exist_ok=True)
        storage.write_whole(folder / HEADER, json.dumps(wanted, indent=1).encode())


def mark_done(folder: pathlib.Path, began: float) -> None:
    """Writes done.json with the seconds since `began` (of `time.perf_counter`), unless an earlier run did.

    Those of starts that were interrupted are not counted.
    """
    if jax.process_index() == 0 and not storage.kind(folder / "done.json"):
        storage.write_whole(
            folder / "done.json", json.dumps({"seconds": round(time.perf_counter() - began, 1)}).encode()
        )


def digest_of(value: Any) -> str:
    """A digest of JSON-compatible data: 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def hashed(seed: int, index: np.ndarray) -> np.ndarray:
    """A hash of (seed, index), uint64 of the shape of `index`; splitmix64."""
    x = index.astype(np.uint64) + np.uint64(digest_seed(seed))
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def digest_seed(seed: int) -> int:
    """A seed spread over 64 bits."""
    return int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:8], "little")
