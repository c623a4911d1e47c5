"""Paths on local disks and on object stores (gs://, s3://): one spelling for both, and what only one of them needs.

A path on an object store is an `epath.Path`, which has the methods of `pathlib.Path`. Files of a store are replaced as
a whole and have no directories; so a file is complete as soon as it is there. `read` reads any part of a file. What
needs a local file (memory mapping, a library in C++, appending) works on a copy: `local_file` in a cache folder with a
bound, `Spool` for output.

The functions here raise FileNotFoundError for a missing file on a store, and `StorageError` for a store that refuses or
does not answer. So a reader that skips a missing file never skips one because of the network.

Environment variables: UNIMM_CACHE_DIR, UNIMM_CACHE_GIB (bound of the cache, default 50).
"""

import base64
import concurrent.futures
import contextlib
import errno
import fcntl
import functools
import hashlib
import importlib.util
import io
import logging
import os
import pathlib
import posixpath
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from unimm_jax import variables
from unimm_jax.errors import ConfigError, StorageError

PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}  # what a scheme needs
STORE_PACKAGES = ("gcsfs", "s3fs", "aiohttp", "google", "botocore", "aiobotocore")  # their errors come from a store
LOGIN = {"gs": "gcloud auth application-default login", "s3": "AWS_PROFILE, or AWS_ACCESS_KEY_ID and its secret"}
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # of the local disk while a file is fetched
THREADS = 16  # requests at a time
LISTED = 4_000  # of more files, the versions come from a listing instead of one request each
CACHE_GIB = 50
PARTIAL = "partial"  # folder in the cache of copies that are being fetched
ABANDONED = 24 * 3600  # seconds after which such a copy is taken to be of a process that was killed
OPEN_ATTEMPTS = 3  # of a local copy that other processes remove
MD5 = "md5:"  # prefix of a checksum that an object store computed
T = TypeVar("T")
SHARED_CACHE = pathlib.Path.home() / ".cache" / "unimm_jax" / "files"


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is on an object store."""
    return re.match(r"(gs|s3):/", str(path)) is not None


def path(name: str | os.PathLike[str]) -> pathlib.Path:
    """A path on a local disk or on an object store, without `..` in the latter.

    Raises:
      ConfigError: a URL of another scheme, or one whose package is not installed.
    """
    text = os.fspath(name) if not isinstance(name, str) else name
    if not is_remote(text):
        if re.match(r"[a-z0-9+]+:/", text):
            raise ConfigError(f"{text} is neither a local path nor on gs:// or s3://; copy it to one of them")
        return pathlib.Path(text).expanduser()
    scheme, _, rest = text.partition(":")
    _prepare(scheme)
    from etils import epath

    found: Any = epath.Path(f"{scheme}://{posixpath.normpath(rest.lstrip('/'))}")
    return found


def at(base: str | os.PathLike[str], name: str | os.PathLike[str]) -> pathlib.Path:
    """A path that is relative to a base, without `..`; an absolute one as it is."""
    if is_remote(name) or os.path.isabs(os.path.expanduser(os.fspath(name))):
        found = path(name)
    elif is_remote(base):
        return path(f"{os.fspath(base)}/{os.fspath(name)}")
    else:
        found = path(base) / path(name)
    return found if is_remote(found) else found.resolve()


def absolute(name: pathlib.Path) -> pathlib.Path:
    """The absolute path; one on an object store is."""
    return name if is_remote(name) else name.absolute()


@functools.cache
def _prepare(scheme: str) -> None:
    """Checks the package of a scheme and turns off its cache of listings, which other processes make stale."""
    if importlib.util.find_spec(PACKAGES[scheme]) is None:
        raise ConfigError(f"{scheme}:// paths need a package: pip install {PACKAGES[scheme]}")
    importlib.import_module(PACKAGES[scheme])  # takes seconds, which no later request should be blamed for
    import fsspec

    for name in {"gs": ("gs", "gcs"), "s3": ("s3", "s3a")}[scheme]:
        fsspec.config.conf.setdefault(name, {})["use_listings_cache"] = False
    if scheme == "gs":
        logging.getLogger("gcsfs").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a message of gcsfs says something that no exception says, too."""
    known = ("Could not determine bucket type", "non-retriable exception", "out of retries on exception")
    return not any(words in record.getMessage() for words in known)


def _filesystem(name: pathlib.Path) -> Any:
    import fsspec

    return fsspec.url_to_fs(str(name))[0]


def refusal(error: BaseException, scheme: str = "gs") -> str:
    """One line for an error of an object store."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return (
        f"the object store refuses or cannot be reached ({line[:300]}). Check the bucket, the login ({LOGIN[scheme]}) "
        "and the network; a run resumes from its last checkpoint"
    )


def _package(error: BaseException) -> str:
    return type(error).__module__.partition(".")[0]


@contextlib.contextmanager
def _request(file: pathlib.Path) -> Iterator[None]:
    """Turns the errors of a request to an object store into FileNotFoundError and `StorageError`."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(file)) from None
    except Exception as error:
        is_of_store = isinstance(error, OSError | ValueError) or _package(error) in STORE_PACKAGES
        if not is_of_store or getattr(error, "errno", None) in DISK_ERRORS:
            raise
        raise StorageError(refusal(error, str(file).partition(":")[0])) from error


# ---- Files -----------------------------------------------------------------------------------------------------------


def write_whole(file: pathlib.Path, data: bytes) -> None:
    """Writes a file atomically: another process sees the old one or the whole new one."""
    if is_remote(file):
        with _request(file):
            _filesystem(file).pipe_file(str(file), data)
        return
    partial = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        partial.write_bytes(data)
        partial.rename(file)
    finally:
        partial.unlink(missing_ok=True)


def read(file: pathlib.Path, start: int = 0, size: int | None = None) -> bytes:
    """Reads a file, or a part of it: by one request on an object store.

    Args:
      size: number of bytes; fewer are read at the end of the file. All up to the end if None.

    Raises:
      OSError: a local file cannot be read.
      FileNotFoundError, StorageError: see the module.
    """
    if not is_remote(file):
        with file.open("rb", buffering=0) as stream:
            stream.seek(start)
            return read_whole(stream, size)
    end = None if size is None else start + size
    if end is not None and end <= start:
        return b""
    with _request(file):
        try:
            whole = end is None and not start and not str(file).startswith("s3:")  # s3fs would ask for the size first
            return _filesystem(file).cat_file(str(file), start=None if whole else start, end=end)
        except (FileNotFoundError, PermissionError):
            raise
        except Exception:
            if start >= _filesystem(file).info(str(file))["size"]:
                return b""  # stores refuse a range behind the end
            raise


def read_whole(stream: io.RawIOBase, size: int | None) -> bytes:
    """Reads `size` bytes, or less at the end of the file; a single read of the system may give less."""
    if size is None:
        return stream.readall()
    data = stream.read(size) or b""
    while len(data) < size and (more := stream.read(size - len(data))):
        data += more
    return data


class RangeFile(io.RawIOBase):
    """A file on an object store for libraries that seek and read. Every read is one request.

    Args (constructor):
      size: of the file, in bytes.
    """

    def __init__(self, file: pathlib.Path, size: int):
        self.file, self.size, self._at = file, size, 0

    def readable(self) -> bool:
        """See `io.IOBase`."""
        return True

    def seekable(self) -> bool:
        """See `io.IOBase`."""
        return True

    def tell(self) -> int:
        """See `io.IOBase`."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """See `io.IOBase`."""
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.size}[whence]
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        """See `io.RawIOBase`; never gives less than asked for before the end of the file."""
        left = max(self.size - self._at, 0)
        data = read(self.file, self._at, left if size is None or size < 0 else min(size, left))
        self._at += len(data)
        return data


def kind(name: pathlib.Path) -> str:
    """What is at a path: "file", "directory", or "" for nothing."""
    if not is_remote(name):
        return "directory" if name.is_dir() else "file" if name.exists() else ""
    with _request(name):
        try:
            return str(_filesystem(name).info(str(name))["type"])
        except FileNotFoundError:
            return ""


def version(file: pathlib.Path) -> tuple[int, str]:
    """The size of a file and what changes with its contents: the checksum of a store, or the time of modification.

    Raises:
      FileNotFoundError, StorageError: see the module. OSError: a local file.
    """
    if not is_remote(file):
        status = file.stat()
        return status.st_size, str(status.st_mtime_ns)
    with _request(file):
        return _version(_filesystem(file).info(str(file)))


def _version(info: dict[str, Any]) -> tuple[int, str]:
    names = ("md5Hash", "crc32c", "ETag", "etag", "generation", "mtime")
    return info["size"], str(next((info[name] for name in names if info.get(name)), ""))


def versions(folder: pathlib.Path, files: Sequence[pathlib.Path]) -> list[tuple[int, str] | None]:
    """`version` of each of some files under a folder on an object store; None for those that are missing."""
    if len(files) > LISTED:
        with _request(folder):
            found = _filesystem(folder).find(str(folder), detail=True)
        known = {name: _version(info) for name, info in found.items()}
        return [known.get(str(file).partition("://")[2]) for file in files]

    def ask(file: pathlib.Path) -> tuple[int, str] | None:
        try:
            return version(file)
        except FileNotFoundError:
            return None

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(ask, files))


def total_size(folder: pathlib.Path) -> int:
    """The bytes of all files under a folder on an object store, from a listing.

    Raises:
      StorageError: the store fails.
    """
    return sum(info["size"] for info in _listing(folder).values())


def _listing(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """What an object store says of all files under a folder, by their names relative to it.

    Empty objects that stand for directories, as Cloud Storage FUSE and the console make them, are left out.
    """
    start = len(str(folder).partition("://")[2]) + 1
    with _request(folder):
        found = _filesystem(folder).find(str(folder), detail=True)
    return {name[start:]: info for name, info in found.items() if name[start:] and not name.endswith("/")}


def files_under(folder: pathlib.Path) -> list[str]:
    """The names of all files under a folder, relative to it, sorted."""
    if not is_remote(folder):
        return sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())
    return sorted(_listing(folder))


def find_files(folder: pathlib.Path, is_wanted: Callable[[str], bool]) -> list[pathlib.Path]:
    """The files under a folder whose names are wanted, sorted by directory and name; also links to missing files."""
    if not is_remote(folder):
        return sorted(file for file in folder.rglob("*") if is_wanted(file.name) and not file.is_dir())
    names = [name for name in files_under(folder) if is_wanted(name.rpartition("/")[2])]
    return [folder / name for name in sorted(names, key=lambda name: name.split("/"))]


def children(folder: pathlib.Path) -> dict[str, bool]:
    """The names in a folder, and whether each is a directory; nothing if there is no such folder."""
    try:
        if not is_remote(folder):
            with os.scandir(folder) as entries:
                return {entry.name: entry.is_dir() for entry in entries}
        with _request(folder):
            found = _filesystem(folder).ls(str(folder), detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    return {info["name"].rstrip("/").rpartition("/")[2]: info["type"] == "directory" for info in found}


def glob(pattern: str) -> list[str]:
    """The files on an object store that a pattern with *, ?, [] and ** matches, sorted."""
    place = path(pattern)
    with _request(place):
        found = _filesystem(place).glob(str(place), detail=True)
    scheme = pattern.partition(":")[0]
    return sorted(f"{scheme}://{name}" for name, info in found.items() if info["type"] == "file")


def checksums(folder: pathlib.Path, known: dict[str, str] | None = None) -> dict[str, str]:
    """Checksums of all files under a folder, by name: SHA-256, or "md5:…" from an object store, which reads nothing.

    Args:
      known: earlier checksums; those of a local folder are computed in their kind, so that they can be compared after
        a folder was copied from an object store. On an object store, a SHA-256 is compared by reading the file.
    """
    given = known or {}
    if not is_remote(folder):
        return {name: _digest(folder / name, given.get(name, "")) for name in files_under(folder)}
    found = {}
    for name, info in _listing(folder).items():
        stored = _stored_md5(info)
        wants_sha = name in given and not given[name].startswith(MD5)
        found[name] = stored if stored and not wants_sha else _digest(folder / name, given.get(name, ""))
    return found


def _stored_md5(info: dict[str, Any]) -> str:
    """The MD5 that an object store has of a file, empty if it has none (an object in several parts)."""
    if value := info.get("md5Hash"):
        return MD5 + base64.b64decode(value).hex()
    tag = str(info.get("ETag", "")).strip('"')
    return MD5 + tag if re.fullmatch(r"[0-9a-f]{32}", tag) else ""


def _digest(file: pathlib.Path, like: str) -> str:
    with _request(file) if is_remote(file) else contextlib.nullcontext(), file.open("rb") as stream:
        if like.startswith(MD5):
            return MD5 + hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        return hashlib.file_digest(stream, "sha256").hexdigest()


def upload(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies a local file to a path on an object store."""
    with _request(target):
        _filesystem(target).put_file(str(source), str(target))


def upload_tree(source: pathlib.Path, target: pathlib.Path, last: str = "") -> None:
    """Copies the files of a local directory to a path on an object store, several at a time.

    Args:
      last: name of a file that is copied after the others.
    """
    names = [name for name in files_under(source) if name != last]
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda name: upload(source / name, target / name), names))
    if last:
        upload(source / last, target / last)


# ---- Local copies ----------------------------------------------------------------------------------------------------


def cache_folder() -> pathlib.Path:
    """The folder of local copies."""
    return pathlib.Path(os.environ.get("UNIMM_CACHE_DIR") or SHARED_CACHE).expanduser()


def cache_bound() -> float:
    """The number of bytes that all local copies together may have.

    Raises:
      ConfigError: UNIMM_CACHE_GIB is no number.
    """
    return variables.number("UNIMM_CACHE_GIB", CACHE_GIB) * 2**30


def local_file(file: pathlib.Path) -> pathlib.Path:
    """The file itself, or a local copy of one on an object store, fetched unless this version of it is there.

    The least recently used copies are removed when all of them together exceed UNIMM_CACHE_GIB.

    Raises:
      StorageError: the store fails. OSError: the cache folder cannot be written.
    """
    if not is_remote(file):
        return file
    copy = cache_place(file, stamp := version(file))
    try:
        os.utime(copy)
        return copy
    except FileNotFoundError:
        pass
    partial = cache_folder() / PARTIAL / uuid.uuid4().hex
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        with _request(file):
            _filesystem(file).get_file(str(file), str(partial))
        if partial.stat().st_size != stamp[0]:
            raise StorageError(f"{file} has {stamp[0]} bytes, and {partial.stat().st_size} arrived; start again")
        _put(partial, copy)
    finally:
        partial.unlink(missing_ok=True)
    return copy


def open_copy(file: pathlib.Path, opening: Callable[[pathlib.Path], T]) -> T:
    """What `opening` makes of the local copy of a file; the copy is fetched again if it was removed meanwhile.

    Raises:
      StorageError: it is removed each time, because the bound of the cache is too small.
    """
    for _ in range(OPEN_ATTEMPTS):
        copy = local_file(file)
        try:
            return opening(copy)
        except (OSError, RuntimeError, ValueError):  # a library in C++ has errors of its own
            if not is_remote(file) or copy.exists():
                raise
    raise StorageError(
        f"the local copy of {file} is removed as soon as it is there: raise UNIMM_CACHE_GIB, the bound of the cache in "
        f"{cache_folder()}"
    )


def cache_place(file: pathlib.Path, stamp: tuple[int, str], suffix: str = "") -> pathlib.Path:
    """Where the cache keeps a copy of a file, or what was computed from it.

    Args:
      stamp: `version` of the file. suffix: of what was computed.
    """
    key = hashlib.sha256(f"{file} {stamp[0]} {stamp[1]}".encode()).hexdigest()[:32]
    return cache_folder() / key / f"{file.name}{suffix}"


def _put(partial: pathlib.Path, copy: pathlib.Path) -> None:
    """Moves a copy to its place, and removes the least recently used ones beyond the bound; one process at a time."""
    bound, folder = cache_bound(), cache_folder()
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        copy.parent.mkdir(exist_ok=True)
        partial.rename(copy)
        copies = []
        for file in folder.glob("*/*"):
            with contextlib.suppress(FileNotFoundError):  # another process renames or removes it
                status = file.stat()
                if file.parent.name != PARTIAL:
                    copies.append((status.st_mtime, status.st_size, file))
                elif time.time() - status.st_mtime > ABANDONED:
                    file.unlink()
        total = sum(size for _, size, _ in copies)
        for _, size, file in sorted(copies):
            if total <= bound:
                return
            if file.parent != copy.parent:
                shutil.rmtree(file.parent, ignore_errors=True)
                total -= size


@contextlib.contextmanager
def output_folder(target: pathlib.Path, last: str = "") -> Iterator[pathlib.Path]:
    """A local directory that becomes `target` when the block ends without an error; nothing is left otherwise.

    What a process left that was killed is removed at the next call with the same target. On an object store, the files
    are copied at the end: a process that is killed in between leaves a part.

    Args:
      last: name of a file that is copied after the others, so that it shows that all of them are there.
    """
    if is_remote(target):
        with tempfile.TemporaryDirectory() as folder:
            yield pathlib.Path(folder)
            upload_tree(pathlib.Path(folder), target, last)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(target)
    partial = target.with_name(f".{target.name}.partial.{uuid.uuid4().hex}")
    lock = _lock_of(partial)
    with lock.open("w") as stream:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(stream, fcntl.LOCK_EX)
        partial.mkdir()
        try:
            yield partial
            partial.rename(target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            lock.unlink(missing_ok=True)


def _lock_of(partial: pathlib.Path) -> pathlib.Path:
    return partial.with_name(f"{partial.name}.lock")


def _remove_abandoned(target: pathlib.Path) -> None:
    """Removes the directories of `output_folder` for a target whose processes are gone: nobody holds their locks."""
    for partial in target.parent.glob(f".{target.name}.partial.{'[0-9a-f]' * 32}"):
        lock = _lock_of(partial)
        with contextlib.suppress(OSError), lock.open("r+") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(partial, ignore_errors=True)
            lock.unlink(missing_ok=True)


class Spool:
    """A local directory for files that grow, and their copies in a directory on an object store.

    For a local target, `folder` is the target itself, and nothing is copied.

    Args (constructor):
      target: the directory. names: files in it that are continued, and so fetched first.
    """

    def __init__(self, target: pathlib.Path, names: tuple[str, ...] = ()):
        self.target = target
        self._copied: dict[str, tuple[int, str]] = {}
        self._temporary = tempfile.TemporaryDirectory() if is_remote(target) else None
        self.folder = pathlib.Path(self._temporary.name) if self._temporary else target
        for name in names if self._temporary else ():
            with contextlib.suppress(FileNotFoundError):
                (self.folder / name).write_bytes(read(target / name))

    def flush(self) -> None:
        """Copies what has changed since the last call, several files at a time."""
        stamps = {name: version(self.folder / name) for name in files_under(self.folder)} if self._temporary else {}
        changed = [name for name in stamps if self._copied.get(name) != stamps[name]]
        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lambda name: upload(self.folder / name, self.target / name), changed))
        self._copied |= stamps

    def close(self) -> None:
        """Copies what has changed and removes the local directory."""
        self.flush()
        if self._temporary:
            self._temporary.cleanup()
