"""Trains one stage: python -m unimm_jax.main --config=configs/stage2.py:laptop --workdir=runs/stage2"""

import ctypes
import logging
import os
import pathlib
import sys

from absl import app, flags


def prepare_process(keep_memory: bool = True) -> None:
    """Settings of this process that must precede the first use of JAX: quiet logs, compilation cache, CPU preset.

    Args:
      keep_memory: on processors, keep freed memory for the next step; compiling gets slower by it, steps faster.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("PILLOW_BLOCKS_MAX", "64")  # decoding threads reuse memory instead of mapping it anew
    if os.environ.get("JAX_PLATFORMS", "cpu") == "cpu" and not _accelerators():
        if "xla_cpu_opt_preset" not in os.environ.get("XLA_FLAGS", ""):
            preset = "--xla_cpu_opt_preset=CPU_OPT_PRESET_FAST_RUNTIME"
            os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {preset}".strip()
        if keep_memory:
            _keep_freed_memory()
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(pathlib.Path.home() / ".cache" / "unimm_jax" / "xla")
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s", stream=sys.stderr)
    for name in ("absl", "orbax", "jax"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _accelerators() -> list[pathlib.Path]:
    """Device files of TPUs and GPUs."""
    return [
        path for pattern in ("accel*", "vfio/[0-9]*", "nvidia[0-9]*") for path in pathlib.Path("/dev").glob(pattern)
    ]


def _keep_freed_memory() -> None:
    """Has glibc keep freed memory for the next step: XLA's CPU buffers would be mapped and zeroed anew at each one."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_trim_threshold, m_top_pad, m_mmap_max, m_arena_max = -1, -2, -4, -8  # malloc.h
        for name, value in ((m_mmap_max, 0), (m_trim_threshold, -1), (m_arena_max, 1), (m_top_pad, 2**28)):
            mallopt(name, value)


def quiet() -> None:
    """Silences libraries below errors (absl sets its level anew when an app starts)."""
    from absl import logging as absl_logging

    absl_logging.set_verbosity(absl_logging.ERROR)


def run(command) -> None:
    """Runs a command; what the user can mend is one message and exit status 1, not a traceback."""
    import jax

    from unimm_jax.checkpoint import Damaged
    from unimm_jax.config import ConfigError
    from unimm_jax.distributed import StartFailed
    from unimm_jax.train import NonFinite

    try:
        command()
    except (ConfigError, Damaged, NonFinite, StartFailed, ValueError) as error:
        if os.environ.get("UNIMM_TRACEBACK"):
            raise
        sys.exit(f"error: {error}")
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        why = str(error).splitlines()[0]
        print(
            f"error: another process of this run has ended or cannot be reached ({why}); start all of them again, the "
            "run goes on from its newest checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # leaving the usual way would wait for the others


def main(_: list[str]) -> None:
    """Trains the stage that the flags name."""
    from unimm_jax import distributed
    from unimm_jax.train import train

    def command() -> None:
        distributed.start()
        train(CONFIG.value, WORKDIR.value or "")

    quiet()
    run(command)


if __name__ == "__main__":
    prepare_process()
    from ml_collections import config_flags

    WORKDIR = flags.DEFINE_string(
        "workdir", None, "Where checkpoints, metrics and pictures of the stage go.", required=True
    )
    CONFIG = config_flags.DEFINE_config_file("config", None, "The stage's config, configs/STAGE.py[:SIZE].")
    flags.mark_flag_as_required("config")
    app.run(main)
