"""The scripts under launch/ and the configs beside them."""

import re
import subprocess

import pytest
from helpers import ROOT

from unimm_jax import resolve
from unimm_jax.data.sources import source_number, split_sources


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "launch").glob("*.sh")))
def test_scripts_have_no_syntax_errors(script):
    subprocess.run(["bash", "-n", str(ROOT / "launch" / script)], check=True)


def test_stage_3_of_illume_names_the_sources_of_its_records():
    """Every source of the script's records is in the mixture once, and no other."""
    script = (ROOT / "launch" / "illume.sh").read_text()
    found = dict(re.findall(r'^(LARGE|MORE)="(.*)"$', script, re.M))
    line = next(line for line in script.splitlines() if line.startswith("records records_stage3"))
    sources = line.split('"')[1].replace("$MORE", found["MORE"]).replace("$LARGE", found["LARGE"])
    listed = split_sources(sources)
    config = resolve.parse(resolve.load(str(ROOT / "launch" / "illume_stage3.py") + ":laptop-illume"))
    numbers = [source_number(entry["source"], listed) for entry in config.data.mixture]
    assert sorted(number for number in numbers if number is not None) == list(range(len(listed)))
    assert sum(entry["weight"] for entry in config.data.mixture) == pytest.approx(1)
    assert config.data.max_slices == 9 and config.data.seq_len >= 10 * 18
    questions = resolve.parse(resolve.load(str(ROOT / "launch" / "illume_questions.py") + ":laptop-illume"))
    assert {entry["source"] for entry in questions.data.mixture} == {"scenes", found["LARGE"]}
    assert sum(entry["weight"] for entry in questions.data.mixture) == pytest.approx(1)
