"""Train step of a LLaMA-shaped language model against `transformers` in PyTorch, eager (SDPA) and `torch.compile`.

python -m benchmarks.lm_step

Both sides compute the forward pass, the loss, its gradient and AdamW, with parameters in float32.

CPU: 20 million parameters, 4 rows of 256 tokens, float32, all cores.
GPU: 1.1 billion parameters (TinyLlama's shape), 4 rows of 2,048 tokens, computed in bfloat16. PyTorch uses autocast
and, to save memory, is compiled only. The share of the throughput of a matrix product is printed (MFU).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import transformers
from flax import nnx

from benchmarks import timing
from unimm_jax.models.keys import Keys
from unimm_jax.models.language import LanguageConfig, LanguageModel
from unimm_jax.objectives.language_modeling import chunked_cross_entropy


@dataclasses.dataclass(frozen=True)
class Case:
    """What is trained: `text_rows` text ids and 128 others, `rows` rows of `length` tokens, computed in `dtype`."""

    shape: LanguageConfig
    text_rows: int
    rows: int
    length: int
    dtype: str

    @property
    def flops(self) -> float:
        """Operations per step by the model's formula: three forward passes."""
        return 3 * self.rows * self.length * self.shape.flops(self.length, self.text_rows + 128)


CPU = Case(
    LanguageConfig(width=384, layers=8, heads=6, kv_heads=6, head_width=64, mlp_width=1024, scan=False),
    *(8064, 4, 256, "float32"),
)
GPU = Case(
    LanguageConfig(width=2048, layers=22, heads=32, kv_heads=4, head_width=64, mlp_width=5632),
    *(32_000, 4, 2048, "bfloat16"),
)


def ours(case: Case, tokens: np.ndarray) -> Callable[[], None]:
    """A function that trains one step."""
    model = LanguageModel(case.shape, case.text_rows, 128, rngs=Keys(params=0))
    graph, params = nnx.split(model)
    tx = optax.adamw(1e-4)
    segments = jnp.ones_like(tokens)
    positions = jnp.broadcast_to(jnp.arange(case.length), tokens.shape)
    dtype = jnp.dtype(case.dtype)

    def step(params: Any, opt: Any, tokens: jax.Array) -> Any:
        def loss_of(params: Any) -> jax.Array:
            m = nnx.merge(graph, params)
            hidden = m(m.embed(tokens, dtype), positions, segments)
            return chunked_cross_entropy(hidden[:, :-1], m.head(dtype), tokens[:, 1:], case.text_rows, 0).mean()

        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), opt, loss

    run = jax.jit(step, donate_argnums=(0, 1))
    state = [params, tx.init(params)]
    ids = jnp.asarray(tokens)

    def once() -> None:
        *state[:], loss = run(*state, ids)
        loss.block_until_ready()

    print(f"{sum(x.size for x in jax.tree.leaves(params)) / 1e6:.1f} million parameters")
    return once


def peer_model(shape: LanguageConfig, ids: int, **settings: Any) -> torch.nn.Module:
    """The model of `transformers` with the same shape; `settings` are more settings of its config."""
    config = transformers.LlamaConfig(
        vocab_size=ids,
        hidden_size=shape.width,
        intermediate_size=shape.mlp_width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        attn_implementation="sdpa",
        **settings,
    )
    return transformers.LlamaForCausalLM(config)


def theirs(case: Case, tokens: np.ndarray, compiled: bool) -> Callable[[], None]:
    """The same in PyTorch."""
    device = timing.peer_device()
    model = peer_model(case.shape, case.text_rows + 128, use_cache=False).to(device).train()
    forward = torch.compile(model) if compiled else model
    optimizer = timing.adamw(model.parameters())
    ids = torch.tensor(tokens, device=device)

    def once() -> None:
        optimizer.zero_grad()
        with timing.autocast(case.dtype):
            loss = forward(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()

    return timing.waited(once)


def main(case: Case, peak: float = 0.0, rounds: int = 9) -> dict[str, float]:
    """Prints the comparison; `peak` is from `timing.ceiling`."""
    tokens = np.random.default_rng(0).integers(0, case.text_rows, (case.rows, case.length))
    names = ("eager", "compiled") if timing.peer_device() == "cpu" else ("compiled",)
    peers = {f"transformers, {name}": theirs(case, tokens, name == "compiled") for name in names}
    title = f"LM train step, {case.rows} × {case.length}, {case.dtype}"
    return timing.compare(title, ours(case, tokens), peers, rounds, case.flops, peak)


if __name__ == "__main__":
    if timing.prepare():
        main(GPU, timing.ceiling())
    else:
        main(CPU)
