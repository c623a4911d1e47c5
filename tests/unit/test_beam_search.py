"""Beam search against all sequences, on a model that knows the last token only."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from unimm_jax.errors import UserError
from unimm_jax.inference.beam_search import beam_search
from unimm_jax.inference.sampling import Sampling

V, STEPS, STOP = 4, 4, 0


def search(table_NVV, beams, penalty):
    """The best sequences of N chains; the state is the last token, and the table a token's log-probabilities."""
    n = len(table_NVV)
    chain = jnp.repeat(jnp.arange(n), beams)

    def log_probs(state, index):
        return jnp.asarray(table_NVV)[chain, state]

    def advance(state, chosen, tokens, index):
        assert chosen.shape == tokens.shape == (n * beams,)
        return tokens

    start = jnp.full(n * beams, 1, jnp.int32)
    return np.asarray(beam_search(start, log_probs, advance, (n, beams, STEPS), STOP, penalty)).tolist()


def best(table_VV, penalty):
    """The best of all sequences, filled with STOP."""
    found = {}
    for length in range(1, STEPS + 1):
        for row in itertools.product(range(V), repeat=length):
            if STOP in row[:-1] or (row[-1] != STOP and length < STEPS):
                continue
            path = (1, *row)
            score = sum(table_VV[a, b] for a, b in zip(path, path[1:], strict=False))
            found[(*row, *[STOP] * (STEPS - length))] = score / length**penalty
    return list(max(found, key=found.get))


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_many_beams_find_the_best_sequence(penalty):
    rng = np.random.default_rng(0)
    table = np.log(rng.dirichlet(np.ones(V), (8, V))).astype(np.float32)
    found = search(table, 64, penalty)
    expected = [best(chain, penalty) for chain in table]
    # with a penalty the search may end early: a longer sequence could still overtake
    assert found == expected if penalty == 0 else sum(a == b for a, b in zip(found, expected, strict=True)) >= 6


def test_one_beam_is_greedy_and_chains_do_not_mix():
    rng = np.random.default_rng(1)
    table = np.log(rng.dirichlet(np.ones(V), (8, V))).astype(np.float32)
    table[:, :, STOP] -= 1
    greedy = []
    for chain in table:
        row, last = [], 1
        while len(row) < STEPS and (not row or row[-1] != STOP):
            last = int(chain[last].argmax())
            row.append(last)
        greedy.append(row + [STOP] * (STEPS - len(row)))
    assert search(table, 1, 1.0) == greedy
    assert search(table, 3, 1.0) == [search(table[i : i + 1], 3, 1.0)[0] for i in range(8)]


def test_settings_that_contradict_each_other_are_refused():
    for wrong in (dict(beams=2), dict(beams=0, temperature=0), dict(min_length=-1)):
        with pytest.raises(UserError):
            Sampling(**wrong)
