"""Compares the speed of this tree with another checkout: runs benchmarks of both in turn.

python -m benchmarks.against_commit OLD_CHECKOUT NAME [NAME ...] [--rounds=3]

NAME is a benchmark that prints with `timing.compare`, for example lm_step. Prints the median seconds of "ours" in both
trees and new / old for each title; below 1 this tree is faster.
"""

import argparse
import collections
import os
import pathlib
import re
import statistics
import subprocess
import sys

Times = dict[str, list[float]]


def read(output: str) -> dict[str, float]:
    """Title → seconds of "ours" in what a benchmark printed."""
    found = re.findall(r"^(.+): ours +([\d.]+) ms \(spread", output, re.MULTILINE)
    return {title: float(milliseconds) / 1e3 for title, milliseconds in found}


def run(checkout: pathlib.Path, name: str) -> dict[str, float]:
    """Runs a benchmark of a checkout in its own process."""
    command = [sys.executable, "-m", f"benchmarks.{name}"]
    env = os.environ | {"PYTHONPATH": str(checkout)}
    done = subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True)
    found = read(done.stdout)
    if done.returncode or not found:
        raise SystemExit(f"benchmarks.{name} of {checkout} failed:\n{done.stdout[-1000:]}{done.stderr[-2000:]}")
    return found


def table(old: Times, new: Times) -> list[str]:
    """Lines with the medians of titles that both trees printed."""
    lines = ["| | old s | new s | new / old |", "|---|---|---|---|"]
    for title in old.keys() & new.keys():
        a, b = statistics.median(old[title]), statistics.median(new[title])
        lines.append(f"| {title} | {a:.4f} | {b:.4f} | {b / a:.3f} |")
    lines[2:] = sorted(lines[2:])
    return lines + [f"only in one tree: {title}" for title in sorted(old.keys() ^ new.keys())]


def main(checkout: pathlib.Path, names: list[str], rounds: int) -> None:
    """Runs every benchmark `rounds` times in each tree and prints the table."""
    here = pathlib.Path(__file__).parent.parent
    times: dict[pathlib.Path, Times] = {tree: collections.defaultdict(list) for tree in (checkout, here)}
    for name in names:
        for index in range(rounds):
            for tree in (checkout, here) if index % 2 == 0 else (here, checkout):
                for title, seconds in run(tree, name).items():
                    times[tree][title].append(seconds)
                    side = "new" if tree == here else "old"
                    print(f"round {index + 1}, {side}: {title}: {seconds:.4f} s", file=sys.stderr, flush=True)
    print("\n".join(table(times[checkout], times[here])))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=pathlib.Path)
    parser.add_argument("names", nargs="+", metavar="NAME")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    main(given.checkout.resolve(), given.names, given.rounds)
