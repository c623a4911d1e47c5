"""Beam search for text. It ends as `transformers` does with `early_stopping=False`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

OUT = -1e9  # added to the score of what is not in the running


class Beams(NamedTuple):
    """State of the search for N prompts with B beams each and sequences of S tokens.

    Attributes:
      state: of the model, for N · B rows.
      running: sequences that go on, int32 [N, B, S]; running_score [N, B], sums of log-probabilities.
      ended: the best sequences that ended, int32 [N, B, S]; ended_score [N, B], with the length penalty;
        is_ended [N, B], whether there is one.
      open: [N], whether a running sequence could still be better than those that ended.
      length: number of tokens so far. stuck: whether no sequence of any prompt can go on.
    """

    state: Any
    running: jax.Array
    running_score: jax.Array
    ended: jax.Array
    ended_score: jax.Array
    is_ended: jax.Array
    open: jax.Array
    length: jax.Array
    stuck: jax.Array


def beam_search(
    state: Any,
    log_probs: Callable[[Any, jax.Array], jax.Array],
    advance: Callable[[Any, jax.Array, jax.Array, jax.Array], Any],
    shape: tuple[int, int, int],
    stop: int,
    length_penalty: float,
) -> jax.Array:
    """The best sequence of each prompt: int32 [N, S], filled with `stop` after its end.

    Args:
      state: state of the model after the prompts, for N · B rows.
      log_probs: (state, tokens so far) → log-probabilities of the next token, float32 [N · B, V]; -inf is not allowed.
      advance: (state, rows that go on int32 [N · B], their tokens int32 [N · B], tokens so far) → next state.
      shape: N, B and S, the maximum number of tokens.
      length_penalty: the score of a sequence that ended is its log-probability divided by length ** length_penalty.
    """
    n, beams, steps = shape
    rows = jnp.arange(n)[:, None]
    empty = jnp.full(shape, stop, jnp.int32)
    nothing = jnp.full((n, beams), OUT)

    def body(b: Beams) -> Beams:
        logp = log_probs(b.state, b.length).reshape(n, beams, -1) + b.running_score[..., None]
        # twice as many candidates as beams, so that enough are left if all of the best ones end here
        score, place = jax.lax.top_k(logp.reshape(n, -1), 2 * beams)
        parent, token = place // logp.shape[-1], (place % logp.shape[-1]).astype(jnp.int32)
        sequences = b.running[rows, parent].at[:, :, b.length].set(token)
        length = b.length + 1
        ends = (token == stop) | (length >= steps)
        running_score, kept = jax.lax.top_k(score + ends * OUT, beams)

        counts = ends & (jnp.arange(2 * beams) < beams) & b.open[:, None]
        final = jnp.where(counts, score / length**length_penalty, OUT)
        ended_score, best = jax.lax.top_k(jnp.concatenate([b.ended_score, final], 1), beams)
        ended = jnp.concatenate([b.ended, sequences], 1)[rows, best]
        is_ended = jnp.concatenate([b.is_ended, counts], 1)[rows, best]
        worst = jnp.where(is_ended, ended_score.min(-1, keepdims=True), OUT)
        possible = running_score[:, :1] / length**length_penalty

        chosen = (rows * beams + parent[rows, kept]).reshape(-1)
        return Beams(
            state=advance(b.state, chosen, token[rows, kept].reshape(-1), b.length),
            running=sequences[rows, kept],
            running_score=running_score,
            ended=ended,
            ended_score=ended_score,
            is_ended=is_ended,
            open=b.open & (possible > worst).any(-1),
            length=length,
            stuck=ends.all(),
        )

    start = Beams(
        state=state,
        running=empty,
        running_score=nothing.at[:, 0].set(0.0),  # all beams start equal, so only one counts
        ended=empty,
        ended_score=nothing,
        is_ended=jnp.zeros((n, beams), bool),
        open=jnp.ones(n, bool),
        length=jnp.int32(0),
        stuck=jnp.bool_(False),
    )
    return jax.lax.while_loop(lambda b: b.open.any() & ~b.stuck, body, start).ended[:, 0]
