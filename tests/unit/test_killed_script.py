"""`benchmarks.killed_script`, with a script that counts."""

import json

from benchmarks import killed_script

SCRIPT = """
mkdir -p "$RUN/stage"
for i in $(seq $(($(cat "$RUN/stage/metrics.jsonl" 2> /dev/null | wc -l) + 1)) 40); do
  echo "{\\"step\\": $i, \\"loss\\": $i.5}" >> "$RUN/stage/metrics.jsonl"
  sleep 0.02
done
mean=$(wc -l < "$RUN/stage/metrics.jsonl")
echo "{\\"questions\\": {\\"seconds\\": $RANDOM, \\"mean\\": $mean}}" > "$RUN/scores.json"
"""


def test_a_killed_script_is_run_to_its_end_and_compared(tmp_path, capsys):
    (tmp_path / "script.sh").write_text(SCRIPT)
    runs = [tmp_path / name for name in ("whole", "killed")]
    assert killed_script.killed(str(tmp_path / "script.sh"), runs[0], 0, 1, seed=0) == 0
    assert killed_script.killed(str(tmp_path / "script.sh"), runs[1], 4, 0.4, seed=0) >= 1
    assert "killed 1 of 4; stage at step" in capsys.readouterr().out
    assert killed_script.differences(*runs) == []
    lines = (runs[1] / "stage" / "metrics.jsonl").read_text().replace("7.5", "7.25")
    (runs[1] / "stage" / "metrics.jsonl").write_text(lines)
    (runs[1] / "scores.json").write_text(json.dumps({"questions": {"mean": 41}}))
    assert killed_script.differences(*runs) == ["losses of stage", "questions"]
