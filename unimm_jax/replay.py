"""Repeats the first steps of a run and names what differs: python -m unimm_jax.replay RUN [--steps=20] [--output=DIR]

RUN is the workdir of a run with a run card (docs/checkpoints.md). Settings can be changed, as in training
(--config.train.micro_batches=2). The exit status is 1 if anything differs.
"""

import pathlib
import sys

from absl import flags
from ml_collections import ConfigDict

from unimm_jax import command_line, process
from unimm_jax.errors import ConfigError


def _saved_config(argv: list[str]) -> ConfigDict:
    """The saved config of the run that the first argument names."""
    from unimm_jax import reproduction, resolve

    return ConfigDict(resolve.from_json(reproduction.saved_config(_run(argv))).as_dict(), type_safe=True)


def _run(argv: list[str]) -> pathlib.Path:
    from unimm_jax import storage

    if len(argv) < 2 or argv[1].startswith("-"):
        raise ConfigError("the first argument is the workdir of a run, for example runs/me/stage2; see --help")
    return storage.path(argv[1])


def cli() -> None:
    """Repeats the run that the first argument names."""
    process.prepare()
    steps = flags.DEFINE_integer("steps", 20, "Number of steps to repeat, at most 20.", lower_bound=1, upper_bound=20)
    output = flags.DEFINE_string("output", "", "Workdir of the repetition, which is kept; a temporary one if empty.")
    words = list(sys.argv)
    config = command_line.define_config(_saved_config)

    def command() -> None:
        import jax

        from unimm_jax import distributed, reproduction, resolve

        parsed = resolve.parse(config())
        distributed.start()
        found = reproduction.repeat(_run(words), parsed, steps.value, output.value)
        if jax.process_index() == 0:
            print("\n".join([*found.differences, found.summary]), flush=True)
        if found.differences:
            sys.exit(1)

    # absl reads flags up to the first other argument, so the run is left out
    process.app(command, argv=[word for i, word in enumerate(sys.argv) if i != 1 or word.startswith("-")])


if __name__ == "__main__":
    cli()
