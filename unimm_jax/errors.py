"""The errors that a user can cause and fix. Commands print them as one line and exit with status 1.

Every other exception is a bug: commands keep its traceback (see `unimm_jax.process.run`).
"""


class UserError(Exception):
    """Base class. The message names what is wrong and how to fix it."""


class ConfigError(UserError):
    """A config has wrong, unknown or conflicting settings; the message lists all of them."""


class DataError(UserError):
    """A data source, a set of records or an output directory is missing or unusable."""


class EmptySplitError(DataError):
    """A source has no records in the split that was asked for."""


class DamagedRecordsError(DataError):
    """Files of records are missing or damaged. Evaluations do not take it for records without a held-out split."""


class InvalidRecordError(DataError):
    """One record of a source is unusable. Readers skip and count such records."""


class JudgeError(DataError):
    """A judge gave no verdict on one image. It is counted under `kind`, and the image can be assessed again.

    Attributes:
      kind: a few words without details, for example "timed out".
    """

    def __init__(self, kind: str, details: str = ""):
        super().__init__(f"{kind}: {details}" if details else kind)
        self.kind = kind


class StorageError(UserError):
    """An object store refuses a request or cannot be reached."""


class CheckpointError(UserError):
    """There is no checkpoint where one is expected, or it does not belong to what it is used for."""


class CorruptCheckpointError(CheckpointError):
    """The files of a checkpoint differ from what was written; the message names them."""


class NonFiniteLossError(UserError):
    """The loss is NaN or infinite; the message names the step."""


class StartupError(UserError):
    """The processes of a run did not connect; the message lists likely causes."""


class OutOfMemoryError(UserError):
    """A program needs more memory than a device or the machine has."""


class WeightsFileError(UserError):
    """A tensor file cannot be read; the message names the file and, if known, the tensor."""


class UnsupportedConfigError(UserError):
    """A published config has a setting without a counterpart here; the message names it."""


class WeightMismatchError(UserError):
    """Names, shapes or settings of weights do not match the model; the message lists all differences."""
