"""Paths on local disks and on object stores (gs://, s3://): one spelling for both, and what only one of them needs.

A path on an object store is an `epath.Path`, which has the methods of `pathlib.Path`. Files of a store are replaced as
a whole and have no directories; so a file is complete as soon as it is there. What needs a local file (memory mapping,
a library in C++, appending) works on a copy: `local_file` in a cache folder with a bound, `Spool` for output.

Environment variables: UNIMM_CACHE_DIR, UNIMM_CACHE_GIB (bound of the cache, default 50).
"""

import base64
import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import logging
import os
import pathlib
import posixpath
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from typing import Any

from unimm_jax.errors import ConfigError

PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}  # what a scheme needs
CACHE_GIB = 50
MD5 = "md5:"  # prefix of a checksum that an object store computed
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
    import fsspec

    for name in {"gs": ("gs", "gcs"), "s3": ("s3", "s3a")}[scheme]:
        fsspec.config.conf.setdefault(name, {})["use_listings_cache"] = False
    if scheme == "gs":
        logging.getLogger("gcsfs").addFilter(lambda r: "Could not determine bucket type" not in r.getMessage())


def _filesystem(name: pathlib.Path) -> Any:
    import fsspec

    return fsspec.url_to_fs(str(name))[0]


# ---- Files -----------------------------------------------------------------------------------------------------------


def write_whole(file: pathlib.Path, data: bytes) -> None:
    """Writes a file atomically: another process sees the old one or the whole new one."""
    if is_remote(file):
        file.write_bytes(data)
        return
    partial = file.with_name(f"{file.name}.{uuid.uuid4().hex}")
    try:
        partial.write_bytes(data)
        partial.rename(file)
    finally:
        partial.unlink(missing_ok=True)


def files_under(folder: pathlib.Path) -> list[str]:
    """The names of all files under a folder, relative to it, sorted."""
    if not is_remote(folder):
        return sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())
    fs, start = _filesystem(folder), str(folder).partition("://")[2]
    return sorted(name[len(start) + 1 :] for name in fs.find(str(folder)))


def checksums(folder: pathlib.Path, known: dict[str, str] | None = None) -> dict[str, str]:
    """Checksums of all files under a folder, by name: SHA-256, or "md5:…" from an object store, which reads nothing.

    Args:
      known: earlier checksums; those of a local folder are computed in their kind, so that they can be compared after
        a folder was copied from an object store. On an object store, a SHA-256 is compared by reading the file.
    """
    given = known or {}
    if not is_remote(folder):
        return {name: _digest(folder / name, given.get(name, "")) for name in files_under(folder)}
    fs, start = _filesystem(folder), str(folder).partition("://")[2]
    found = {}
    for name, info in fs.find(str(folder), detail=True).items():
        short = name[len(start) + 1 :]
        stored = _stored_md5(info)
        wants_sha = short in given and not given[short].startswith(MD5)
        found[short] = stored if stored and not wants_sha else _digest(folder / short, given.get(short, ""))
    return found


def _stored_md5(info: dict[str, Any]) -> str:
    """The MD5 that an object store has of a file, empty if it has none (an object in several parts)."""
    if value := info.get("md5Hash"):
        return MD5 + base64.b64decode(value).hex()
    tag = str(info.get("ETag", "")).strip('"')
    return MD5 + tag if re.fullmatch(r"[0-9a-f]{32}", tag) else ""


def _digest(file: pathlib.Path, like: str) -> str:
    with file.open("rb") as stream:
        if like.startswith(MD5):
            return MD5 + hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        return hashlib.file_digest(stream, "sha256").hexdigest()


def upload(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies a local file to a path on an object store."""
    _filesystem(target).put_file(str(source), str(target))


def upload_tree(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies a local directory to a path on an object store."""
    for name in files_under(source):
        upload(source / name, target / name)


# ---- Local copies ----------------------------------------------------------------------------------------------------


def cache_folder() -> pathlib.Path:
    """The folder of local copies."""
    return pathlib.Path(os.environ.get("UNIMM_CACHE_DIR") or SHARED_CACHE).expanduser()


def local_file(file: pathlib.Path) -> pathlib.Path:
    """The file itself, or a local copy of one on an object store, fetched unless this version of it is there.

    The least recently used copies are removed when all of them together exceed UNIMM_CACHE_GIB.
    """
    if not is_remote(file):
        return file
    fs = _filesystem(file)
    info = fs.info(str(file))
    version = f"{file} {info['size']} {info.get('md5Hash') or info.get('ETag') or info.get('mtime')}"
    folder = cache_folder()
    copy = folder / hashlib.sha256(version.encode()).hexdigest()[:32] / file.name
    try:
        os.utime(copy)
        return copy
    except FileNotFoundError:
        pass
    copy.parent.mkdir(parents=True, exist_ok=True)
    partial = copy.with_name(f"{copy.name}.{uuid.uuid4().hex}")
    try:
        fs.get_file(str(file), str(partial))
        if partial.stat().st_size != info["size"]:
            raise OSError(f"{file} has {info['size']} bytes, and {partial.stat().st_size} arrived")
        partial.rename(copy)
    finally:
        partial.unlink(missing_ok=True)
    _trim(folder, keep=copy)
    return copy


def _trim(folder: pathlib.Path, keep: pathlib.Path) -> None:
    """Removes the least recently used copies beyond the bound; one process at a time."""
    bound = float(os.environ.get("UNIMM_CACHE_GIB") or CACHE_GIB) * 2**30
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        copies = []
        for file in folder.glob("*/*"):
            with contextlib.suppress(FileNotFoundError):  # another process renames or removes it
                status = file.stat()
                copies.append((status.st_mtime, status.st_size, file))
        total = sum(size for _, size, _ in copies)
        for _, size, file in sorted(copies):
            if total <= bound:
                return
            if file != keep:
                shutil.rmtree(file.parent, ignore_errors=True)
                total -= size


@contextlib.contextmanager
def output_folder(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """A local directory that becomes `target` when the block ends without an error; nothing is left otherwise.

    On an object store, its files are copied then, one by one: a process that is killed in between leaves a part.
    """
    if is_remote(target):
        with tempfile.TemporaryDirectory() as folder:
            yield pathlib.Path(folder)
            upload_tree(pathlib.Path(folder), target)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}.partial.", dir=target.parent))
    try:
        yield partial
        partial.chmod(0o755)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


class Spool:
    """A local directory for files that grow, and their copies in a directory on an object store.

    For a local target, `folder` is the target itself, and nothing is copied.

    Args (constructor):
      target: the directory. names: files in it that are continued, and so fetched first.
    """

    def __init__(self, target: pathlib.Path, names: tuple[str, ...] = ()):
        self.target = target
        self._copied: dict[str, tuple[int, int]] = {}
        self._temporary = tempfile.TemporaryDirectory() if is_remote(target) else None
        self.folder = pathlib.Path(self._temporary.name) if self._temporary else target
        for name in names if self._temporary else ():
            if (target / name).exists():
                (self.folder / name).write_bytes((target / name).read_bytes())

    def flush(self) -> None:
        """Copies what has changed since the last call."""
        for name in files_under(self.folder) if self._temporary else ():
            status = (self.folder / name).stat()
            stamp = status.st_size, status.st_mtime_ns
            if self._copied.get(name) != stamp:
                upload(self.folder / name, self.target / name)
                self._copied[name] = stamp

    def close(self) -> None:
        """Copies what has changed and removes the local directory."""
        self.flush()
        if self._temporary:
            self._temporary.cleanup()
