"""Greedy generation with a key/value cache against `generate` of `transformers`, for models of the same shape.

python -m benchmarks.generation

Prompts of 32 tokens, 64 new tokens, batches of 1 and 16. On a CPU the language model of size `laptop` and one of
20 million parameters in float32, on a GPU one of 1.1 billion parameters in bfloat16.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from benchmarks import lm_step, timing
from unimm_jax import resolve
from unimm_jax.inference.sampling import Sampling, sample_token
from unimm_jax.models.keys import Keys
from unimm_jax.models.language import LanguageConfig, LanguageModel

PROMPT, NEW = 32, 64
# name → (language model, number of ids)
CPU = {
    "laptop": (LanguageConfig(**resolve.load("stage2:laptop").model.language), 1024),
    "20M": (
        LanguageConfig(width=384, layers=8, heads=6, kv_heads=6, head_width=64, mlp_width=1024, scan=False),
        8192,
    ),
}
GPU = {"1.1B": (lm_step.GPU.shape, lm_step.GPU.text_rows)}


def ours(shape: LanguageConfig, ids: int, tokens: np.ndarray, dtype: str) -> Callable[[], None]:
    """A function that prefills and then decodes token by token in a scan, as `inference.sampling.Decoding` does."""
    batch = len(tokens)
    graph, params = nnx.split(LanguageModel(shape, ids - 128, 128, rngs=Keys(params=0)))
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    greedy = Sampling(temperature=0)
    keys = jax.random.split(jax.random.key(0), batch)

    @jax.jit
    def generate(params: Any, tokens: jax.Array) -> jax.Array:
        m = nnx.merge(graph, params)
        slots = jnp.arange(PROMPT + NEW)
        extend, cache = m.incremental(batch, PROMPT + NEW, dtype)
        causal = jnp.broadcast_to(jnp.arange(PROMPT)[:, None] >= slots, (batch, PROMPT, PROMPT + NEW))
        positions = jnp.broadcast_to(jnp.arange(PROMPT), (batch, PROMPT))
        hidden, cache = extend(m.embed(tokens, dtype), positions, causal, cache, 0)

        head = m.head(dtype).T  # transposed once

        def body(carry: Any, index: jax.Array) -> Any:
            hidden, cache = carry
            token = sample_token(jnp.einsum("nd,dv->nv", hidden, head), keys, greedy)
            at = PROMPT + index
            mask = jnp.broadcast_to(slots <= at, (batch, 1, PROMPT + NEW))
            x, cache = extend(m.embed(token[:, None], dtype), jnp.full((batch, 1), at), mask, cache, at)
            return (x[:, 0], cache), token

        return jax.lax.scan(body, (hidden[:, -1], cache), jnp.arange(NEW))[1].T

    def once() -> None:
        generate(params, tokens).block_until_ready()

    return once


def theirs(shape: LanguageConfig, ids: int, tokens: np.ndarray, dtype: str) -> Callable[[], None]:
    """The same with `generate`."""
    model = lm_step.peer_model(shape, ids, eos_token_id=None, pad_token_id=0)
    model.eval().to(timing.peer_device(), getattr(torch, dtype))
    prompt = torch.tensor(tokens, device=timing.peer_device())
    options = dict(do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW, attention_mask=torch.ones_like(prompt))

    def once() -> None:
        with torch.no_grad():
            assert model.generate(prompt, **options).shape[1] == PROMPT + NEW

    return timing.waited(once)


def main(shapes: dict[str, tuple[LanguageConfig, int]], dtype: str, rounds: int = 5) -> None:
    """Prints the comparison of each model at batches of 1 and 16."""
    for name, (shape, ids) in shapes.items():
        for rows in (1, 16):
            prompt = np.random.default_rng(0).integers(0, ids, (rows, PROMPT))
            peers = {"transformers generate": theirs(shape, ids, prompt, dtype)}
            title = f"{NEW} new tokens, {name}, batch {rows}, {dtype}"
            timing.compare(title, ours(shape, ids, prompt, dtype), peers, rounds)


if __name__ == "__main__":
    if timing.prepare():
        main(GPU, "bfloat16")
    else:
        main(CPU, "float32")
