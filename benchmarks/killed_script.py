"""Does a training script end with the same scores after SIGKILL at random moments?

bash launch/illume.sh
python -m benchmarks.killed_script --script=launch/illume.sh --run=runs/killed --equal=runs/illume --kills=12

Runs the script (launch/quickstart.sh or launch/illume.sh) with RUN set, kills it with all its processes, and runs it
again, until it was killed so many times; then it may end. The times from a start to its kill are drawn from 0 to
`--longest` seconds. The losses of all stages (`metrics.jsonl`), and the scores (`scores.json`) except for times, must
be those of the finished run `--equal`, bit by bit. The exit status is 1 if they are not.
"""

import argparse
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time
from typing import Any

from unimm_jax import metrics


def killed(script: str, run: pathlib.Path, kills: int, longest: float, seed: int) -> int:
    """Runs a script to its end with kills on the way; the number of kills. Prints the moment of each.

    Raises:
      CalledProcessError: the script fails.
    """
    moments, count = random.Random(seed), 0
    words, env = ["bash", script], os.environ | {"RUN": str(run)}
    began = time.monotonic()
    while count < kills:
        process = subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL, start_new_session=True)
        try:
            status = process.wait(moments.uniform(0, longest))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            count += 1
            print(f"{time.monotonic() - began:.0f} s: killed {count} of {kills}; {_where(run)}", flush=True)
        else:
            if status:
                raise subprocess.CalledProcessError(status, words)
            return count
    subprocess.run(words, env=env, stdout=subprocess.DEVNULL, check=True)
    return count


def _where(run: pathlib.Path) -> str:
    """The newest metrics of a run, as "stage3 at step 1200"."""
    files = sorted(run.glob("*/metrics.jsonl"), key=lambda file: file.stat().st_mtime)
    steps = re.findall(r'"step": (\d+)', files[-1].read_text()) if files else []
    return f"{files[-1].parent.name} at step {steps[-1]}" if steps else "no step yet"


def differences(run: pathlib.Path, other: pathlib.Path) -> list[str]:
    """What differs between two finished runs: stages with other losses, and scores."""
    stages = sorted({file.parent.name for place in (run, other) for file in place.glob("*/metrics.jsonl")})
    found = [f"losses of {stage}" for stage in stages if _losses(run / stage) != _losses(other / stage)]
    scores = [_without_times(json.loads((place / "scores.json").read_text())) for place in (run, other)]
    names = sorted(scores[0].keys() | scores[1].keys())
    return found + [name for name in names if scores[0].get(name) != scores[1].get(name)]


def _losses(stage: pathlib.Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in metrics.read(stage)]


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(entry) for key, entry in value.items() if "seconds" not in key}
    return value


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", default="launch/illume.sh")
    parser.add_argument("--run", type=pathlib.Path, required=True, help="directory of the run that is killed")
    parser.add_argument("--equal", type=pathlib.Path, required=True, help="directory of a finished run")
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--longest", type=float, default=300, help="seconds from a start to its kill, at most")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    flags = parser.parse_args()
    count = killed(flags.script, flags.run.resolve(), flags.kills, flags.longest, flags.seed)
    found = differences(flags.run, flags.equal)
    print(f"killed {count} times; " + (f"differs: {', '.join(found)}" if found else "equal"))
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
