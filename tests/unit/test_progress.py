"""Lines that show how far a command is."""

import pytest

from unimm_jax.progress import duration

SHOWN = [(0, "0:00"), (59.9, "0:59"), (61, "1:01"), (3599, "59:59"), (4000, "1:06:40"), (90_000, "25:00:00")]


@pytest.mark.parametrize(("seconds", "shown"), SHOWN)
def test_durations(seconds, shown):
    assert duration(seconds) == shown
