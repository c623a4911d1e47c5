"""Checks what a run needs without compiling: python -m unimm_jax.preflight --config=stage2:7b --workdir=runs/stage2

Prints a line for each check, with the remedy where something is wrong. The exit status is 1 if a run cannot work.
"""

import os
import sys

from absl import flags

from unimm_jax import command_line, process


def cli() -> None:
    """Runs the checks that the flags ask for."""
    process.prepare()
    workdir = flags.DEFINE_string("workdir", "", "Workdir of the run; checked if given.")
    chips = flags.DEFINE_integer("chips", 0, "Number of devices over all processes that there should be; 0 is any.")
    platform = flags.DEFINE_enum("platform", "", ["", "tpu", "gpu", "cpu"], "Platform that there should be.")
    given = any(word.lstrip("-").partition("=")[0] == "config" for word in sys.argv[1:])
    config = command_line.define_config() if given else None

    def command() -> None:
        from unimm_jax import environment, resolve

        parsed = resolve.parse(config()) if config is not None else None
        blocked = False
        for part in (
            environment.versions,
            environment.coordinator,
            environment.connection,
            lambda: environment.findings(parsed, workdir.value, chips.value, platform.value),
        ):
            for finding in part():
                print(finding.line(), flush=True)
                blocked |= finding.level == environment.BLOCKER
                if finding.level == environment.BLOCKER and finding.check == "network":
                    os._exit(1)  # the others would be waited for
        if blocked:
            sys.exit(1)

    process.app(command)


if __name__ == "__main__":
    cli()
