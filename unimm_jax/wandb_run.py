"""A run on Weights & Biases, beside TensorBoard. Its failures are warnings: training continues without it."""

import importlib.util
import logging
import pathlib
import uuid
from collections.abc import Callable
from typing import Any

import numpy as np

from unimm_jax import storage
from unimm_jax.config import Config
from unimm_jax.errors import ConfigError

ID_FILE = "wandb_id.txt"  # in the workdir, so that a resumed run continues the same run there
LOGIN_SECONDS, FINISH_SECONDS = 60, 600  # how long to wait for a key on the console, and for the last upload


def check(project: str) -> None:
    """Checks that the package is installed if a project is named.

    Raises:
      ConfigError: it is not.
    """
    if project and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"config.train.wandb is {project!r}, and the package wandb is not installed; run pip install wandb, or set "
            "config.train.wandb to ''"
        )


class WandbRun:
    """Logs to a run of the project `config.train.wandb`. After a failure it warns once and does nothing more.

    Values are plotted over "step", not over the number of calls, so a resumed run writes the same points again.

    Args (constructor):
      workdir: holds the id of the run. If it is local, also the files of the package. They grow all the time, so for a
        workdir on an object store they are where WANDB_DIR says.
    """

    def __init__(self, config: Config, workdir: pathlib.Path):
        self._run: Any = None
        self._run = self._try("the start", lambda: _start(config, workdir))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Logs numbers of a step."""
        if self._run is not None:
            self._try("logging", lambda: self._run.log({"step": step} | values))

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Logs an image, uint8 [H, W, 3]."""
        if self._run is not None:
            import wandb

            self._try("logging an image", lambda: self._run.log({"step": step, name: wandb.Image(image)}))

    def close(self) -> None:
        """Ends the run; waits up to `FINISH_SECONDS` for the last upload."""
        if self._run is not None:
            self._try("the end", lambda: self._run.finish())

    def _try(self, what: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:  # whatever the package and its network raise; training does not depend on it
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            logging.warning("Weights & Biases: %s failed (%s); training continues without it", what, reason)
            self._run = None
            return None


def _start(config: Config, workdir: pathlib.Path) -> Any:
    import wandb

    file = workdir / ID_FILE
    if not file.exists():
        storage.write_whole(file, uuid.uuid4().hex[:8].encode())
    run = wandb.init(
        project=config.train.wandb,
        id=file.read_text().strip(),
        resume="allow",
        name=config.name,
        dir=None if storage.is_remote(workdir) else str(workdir),
        config=config.as_dict(),
        settings={"login_timeout": LOGIN_SECONDS, "finish_timeout": FINISH_SECONDS, "finish_timeout_raises": True},
    )
    run.define_metric("step", hidden=True)
    run.define_metric("*", step_metric="step")
    return run
