"""A directory of images with captions in text files of the same name."""

import pathlib

from unimm_jax import storage
from unimm_jax.data.outlines import Record
from unimm_jax.data.sources.base import fingerprint_files
from unimm_jax.errors import DataError, InvalidRecordError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}


class FolderSource:
    """Images with a `.txt` file of the same name in the same directory, one caption per line; includes subdirectories.

    Raises (constructor):
      DataError: the directory contains no images.
    """

    splits = ("train",)
    evaluator = "captions"

    def __init__(self, path: str):
        self.name, self.root = path, storage.path(path)
        self.files = storage.find_files(self.root, _is_image)
        if not self.files:
            raise DataError(f"{path} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")

    @classmethod
    def open(cls, path: str, split: str) -> "FolderSource":
        """Opens a directory. It has no test split (see `open_source`).

        Raises:
          DataError: `path` is not a directory, or it contains no images.
        """
        del split
        if storage.kind(storage.path(path)) != "directory":
            raise DataError(f"data source folder:{path} is not a directory")
        return cls(path)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Record:
        file = self.files[index]
        text = file.with_suffix(".txt")
        try:
            lines = storage.read(text).decode("utf-8").splitlines()
        except FileNotFoundError:
            raise InvalidRecordError(f"no caption file {text.name} beside it") from None
        except UnicodeDecodeError as error:
            raise InvalidRecordError(f"its caption is not UTF-8 text ({error.reason} at byte {error.start})") from error
        except OSError as error:
            raise InvalidRecordError(f"its caption file cannot be read ({error.strerror})") from error
        captions = [line.strip() for line in lines if line.strip()]
        if not captions:
            raise InvalidRecordError("its caption is empty")
        try:
            data = storage.read(file)
        except FileNotFoundError:
            is_link = not storage.is_remote(file) and file.is_symlink()
            what = "it is a symbolic link to a missing file" if is_link else "it has disappeared"
            raise InvalidRecordError(what) from None
        except OSError as error:
            raise InvalidRecordError(f"it cannot be read ({error.strerror})") from error
        return Record(self.key(index), (data,), captions=captions)

    def key(self, index: int) -> str:
        """See `Source.key`."""
        return str(self.files[index].relative_to(self.root))

    def fingerprint(self) -> str:
        """See `Source.fingerprint`."""
        both = (path for file in self.files for path in (file, file.with_suffix(".txt")))
        return fingerprint_files(self.root, both)


def _is_image(name: str) -> bool:
    return pathlib.PurePath(name).suffix.lower() in IMAGE_SUFFIXES
