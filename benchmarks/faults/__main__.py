"""Faults at random moments of training: does the run still end with the same bits?

python -m benchmarks.faults --points=100 --seed=0 --output=runs/faults

A tiny text stage is trained from records without faults, and then again and again with one fault after the other at
moments that the seed decides: while it starts, compiles, trains, saves, evaluates and ends. The faults:

- SIGKILL, SIGTERM, and SIGSTOP followed by SIGCONT or SIGKILL, to one process or to all of them
- a full disk: a file system in memory is filled. Needs the right to mount one; otherwise these points are skipped, and
  the exit status is 1
- a file of the records that is missing for some seconds
- an object store (that of the tests, on loopback) that answers 10% to 50% of the requests with 429, 503 or a cut
  connection, or that is killed and started again with its data

Runs have 1, 2 or 4 processes. A run is started again after each fault until it finishes. Then its checkpoint
(parameters, optimizer state, position in the data), its metrics and its scores must be equal to those of the
undisturbed run with as many processes, bit by bit and except for times, and it must not leave other files. A process
may end with one line of error that names the fault while it lasts (or another process that has ended), but not with a
traceback, and it must not hang.

Each point's result is a line of OUTPUT/points.jsonl. An interrupted campaign continues at the same commit.
OUTPUT/results.md has a table, OUTPUT/runs/ the logs of all runs. Eight points take about 4 minutes on two idle cores of
an AMD EPYC of family 25.
"""

import argparse
import logging
import pathlib
import signal
import sys

from benchmarks.claims import experiment
from benchmarks.faults.plan import PROCESSES


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=100, help="number of faults")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=experiment.local_path, default=pathlib.Path("runs/faults"))
    parser.add_argument("--processes", type=int, nargs="+", choices=sorted(PROCESSES), default=sorted(PROCESSES))
    parser.add_argument("--only", type=int, nargs="+", metavar="NUMBER", help="these points alone, of the same plan")
    flags = parser.parse_args()
    from benchmarks.faults.campaign import Campaign
    from unimm_jax import process
    from unimm_jax.runcard import commit

    process.prepare()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that runs are ended, too
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns about each state that is read without its step
    settings = dict(seed=flags.seed, processes=flags.processes, commit=commit())
    output = experiment.prepare(flags.output, "faults", False, **settings)
    ended = Campaign(output, flags.seed, flags.points, flags.processes, flags.only).run()
    print((output / "results.md").read_text())
    if set(ended) != {"equal"}:
        counted = ", ".join(f"{count} {result}" for result, count in sorted(ended.items()))
        raise SystemExit(f"not all points ended in the same bits: {counted}; logs are in {output / 'runs'}")


if __name__ == "__main__":
    main()
