"""Environment variables that hold numbers."""

import pytest

from unimm_jax import storage, variables
from unimm_jax.errors import ConfigError


@pytest.mark.parametrize(("text", "value"), [(None, 50), ("", 50), ("0.5", 0.5), ("200", 200)])
def test_a_number_or_its_default(monkeypatch, text, value):
    monkeypatch.delenv("SOME", raising=False)
    if text is not None:
        monkeypatch.setenv("SOME", text)
    assert variables.number("SOME", 50) == value


@pytest.mark.parametrize("text", ["100GB", "5m", "-1", "nan", "inf"])
def test_a_wrong_value_is_one_line_that_names_the_variable(monkeypatch, text):
    monkeypatch.setenv("UNIMM_CACHE_GIB", text)
    with pytest.raises(ConfigError, match=f"UNIMM_CACHE_GIB is '{text}'; give a number, such as 50$"):
        storage.cache_bound()
