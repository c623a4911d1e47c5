"""Forward pass and train step of a ViT-B/16 encoder against the ViT of `transformers` in PyTorch.

python -m benchmarks.vit

Images of 224 pixels. The train step is the forward pass, a mean-square loss, its gradient and AdamW, with float32
parameters. On a CPU 4 images in float32. On a GPU 128 images in bfloat16, with a compiled peer; the share of the
throughput of a matrix product is printed (MFU).
"""

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
from unimm_jax.models.vit import ViT, ViTConfig

SHAPE = ViTConfig(patch_size=16, width=768, depth=12, heads=12, mlp_width=3072, biases="qkv", scan=False)
CPU, GPU = (4, "float32"), (128, "bfloat16")


def peer_model(shape: ViTConfig) -> torch.nn.Module:
    """The model of `transformers` with the same shape."""
    config = transformers.ViTConfig(
        hidden_size=shape.width,
        num_hidden_layers=shape.depth,
        num_attention_heads=shape.heads,
        intermediate_size=shape.mlp_width,
        image_size=shape.image_size,
        patch_size=shape.patch_size,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.ViTModel(config, add_pooling_layer=False)


def main(images: int, dtype: str, shape: ViTConfig = SHAPE, peak: float = 0.0, rounds: int = 9) -> None:
    """Prints both comparisons; `peak` is from `timing.ceiling`."""
    device, half = timing.peer_device(), dtype == "bfloat16"
    size = (images, shape.image_size, shape.image_size, 3)
    pixels = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    graph, params = nnx.split(ViT(shape, rngs=Keys(params=0)))
    given = jnp.asarray(pixels, dtype)
    forward = jax.jit(lambda params, x: nnx.merge(graph, params)(x))
    tx = optax.adamw(1e-4)

    def loss_of(params: Any, x: jax.Array) -> jax.Array:
        return (nnx.merge(graph, params)(x).astype(jnp.float32) ** 2).mean()

    def step(params: Any, opt: Any, x: jax.Array) -> Any:
        loss, grads = jax.value_and_grad(loss_of)(params, x)
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), opt, loss

    train = jax.jit(step, donate_argnums=(0, 1))
    model = peer_model(shape).to(device)
    peer = torch.compile(model) if half else model
    x = torch.tensor(pixels, device=device).permute(0, 3, 1, 2).contiguous()
    name = "transformers, compiled" if half else "transformers"

    def theirs() -> None:
        with torch.no_grad(), timing.autocast(dtype):
            peer(x)

    frozen = jax.tree.map(lambda w: w.astype(dtype), params)  # the dtype of frozen parameters in training
    timing.compare(
        f"ViT-B/16 forward, {dtype}",
        lambda: forward(frozen, given).block_until_ready(),
        {name: timing.waited(theirs)},
        rounds,
        images * shape.flops,
        peak,
    )
    state = [params, tx.init(params)]
    optimizer = timing.adamw(model.parameters())

    def ours_train() -> None:
        *state[:], loss = train(*state, given)
        loss.block_until_ready()

    def theirs_train() -> None:
        optimizer.zero_grad()
        with timing.autocast(dtype):
            loss = (peer(x).last_hidden_state.float() ** 2).mean()
        loss.backward()
        optimizer.step()

    timing.compare(
        f"ViT-B/16 train step, {dtype}",
        ours_train,
        {name: timing.waited(theirs_train)},
        min(rounds, 5),
        3 * images * shape.flops,
        peak,
    )


if __name__ == "__main__":
    if timing.prepare():
        main(*GPU, peak=timing.ceiling())
    else:
        main(*CPU)
