"""Trains one stage: python -m unimm_jax.main --config=configs/stage2.py:laptop --workdir=runs/stage2"""

import sys

from absl import flags

from unimm_jax import command_line, process


def cli() -> None:
    """Trains the stage that the flags name, or prints its config with --print_config."""
    process.prepare()
    workdir = flags.DEFINE_string("workdir", None, "Directory for checkpoints, metrics and images of the stage.")
    print_config = flags.DEFINE_bool("print_config", False, "Print the complete config and exit.")
    config = command_line.define_config()

    def command() -> None:
        from unimm_jax import distributed, resolve
        from unimm_jax.errors import ConfigError
        from unimm_jax.train import train

        parsed = resolve.parse(config())
        if print_config.value:
            print(resolve.to_text(parsed), end="")
            return
        if not workdir.value:
            raise ConfigError("--workdir is missing; give a directory for checkpoints, metrics and images")
        distributed.start()
        if train(parsed, workdir.value) is None:
            sys.exit(distributed.STOPPED)

    process.app(command)


if __name__ == "__main__":
    cli()
