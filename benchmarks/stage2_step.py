"""The stage-2 step against PyTorch: frozen encoder, trained merger, adapter and language model, packed rows.

python -m benchmarks.stage2_step

Rows of 2,048 tokens hold [image, text] and [text, image] pairs of dynamic length (see `benchmarks.dynamic_tokens`). The
optimizer is AdamW.

CPU: a language model of 20 million parameters, float32.
GPU: a ViT-B/14 and a language model of 1.1 billion parameters (TinyLlama's shape), computed in bfloat16 with float32
parameters (PyTorch uses autocast). The share of the throughput of a matrix product is printed (MFU).

The peer is the ViT and LlamaForCausalLM (SDPA) of `transformers` with the merger of exported models between them, all
under `torch.compile`. Its merger computes all 256 rows of an image, as LaVIT's code does. It gets the same rows, images
and targets. Its attention is causal over whole rows and needs no mask for packed segments.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks import dynamic_tokens, lm_step, timing, tokenizer_forward, vit
from unimm_jax.interop import image_tokenizer_unimm

GPU = dynamic_tokens.Sizes(
    dict(width=768, depth=12, heads=12, mlp_width=3072),
    dict(heads=12, mlp_width=3072, merger_depth=2),
    dataclasses.asdict(lm_step.GPU.shape),
    *("bfloat16", 4),
)
CPU = dynamic_tokens.Sizes(
    dict(width=192, depth=4, heads=3, mlp_width=768, scan=False),
    dict(heads=3, mlp_width=768, merger_depth=2, scan=False),
    dataclasses.asdict(lm_step.CPU.shape),
    *("float32", 1),
)


class Peer(torch.nn.Module):
    """The same parts; `forward` returns the loss."""

    def __init__(self, parts: dict[str, Any], ids: int):
        super().__init__()
        encoder, language, shape = parts["encoder"], parts["language"], parts["image_tokenizer"]
        self.encoder = vit.peer_model(encoder).requires_grad_(False)
        self.merger = image_tokenizer_unimm.Merger(encoder.width, tokenizer_forward.peer_settings(shape))
        self.adapter = torch.nn.Linear(encoder.width, language.width)
        self.language = lm_step.peer_model(language, ids, use_cache=False)

    def forward(self, images, keep, tokens, where, source, labels):
        """The loss. Merged row `source` of the flattened images replaces the embedding at position `where`.

        Args:
          images: [N, 3, H, W]. keep: masks [N, P]. tokens, labels: [B, T].
        """
        with torch.no_grad():
            features = self.encoder(images).last_hidden_state[:, 1:]
        rows = self.adapter(self.merger.dense(features, keep)).flatten(0, 1)
        x = self.language.get_input_embeddings()(tokens)
        x = x.flatten(0, 1).index_put((where,), rows[source].to(x.dtype)).view_as(x)
        return self.language(inputs_embeds=x, labels=labels).loss


def sources(case: dynamic_tokens.Case) -> tuple[np.ndarray, np.ndarray]:
    """(positions of the flattened rows that hold features, flattened patch whose merged row each of them reads)."""
    keep, index = case.batch["keep"], case.batch["feature_index"]
    row, _ = np.nonzero(index >= 0)
    max_image_tokens = case.config.model["unified"].max_image_tokens  # feature s of an image is its s-th kept patch
    image, nth = row * keep.shape[1] + index[index >= 0] // max_image_tokens, index[index >= 0] % max_image_tokens
    patch = np.argsort(~keep.reshape(-1, keep.shape[-1]), axis=1, kind="stable")[image, nth]
    return np.flatnonzero(index >= 0), image * keep.shape[-1] + patch


def theirs(case: dynamic_tokens.Case) -> Callable[[], None]:
    """A function that trains the peer for one step on the batch of the case."""
    device = timing.peer_device()
    model = Peer(case.config.model, dynamic_tokens.VOCABULARY.size).to(device).train()
    batch, (where, source) = case.batch, sources(case)
    images = batch["images"].reshape(-1, *batch["images"].shape[2:])

    def tensor(x: np.ndarray) -> torch.Tensor:
        return torch.tensor(x, device=device)

    arguments = (
        tensor(images).permute(0, 3, 1, 2).float() / 127.5 - 1,
        tensor(batch["keep"].reshape(len(images), -1)),
        tensor(batch["tokens"]).long(),
        tensor(where),
        tensor(source),
        tensor(np.where(batch["weights"] > 0, batch["targets"], -100)).long(),
    )
    forward = torch.compile(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = timing.adamw(trained)

    def once() -> None:
        optimizer.zero_grad()
        with timing.autocast(case.config.dtype):
            loss = forward(*arguments)
        loss.backward()
        optimizer.step()

    return timing.waited(once)


def main(size: dynamic_tokens.Sizes, peak: float = 0.0, rounds: int = 9) -> dict[str, float]:
    """Prints the comparison; `peak` is from `timing.ceiling`."""
    case = dynamic_tokens.case(dynamic_tokens.drawn_lengths(), dynamic_tokens.MAX_TOKENS, 12, size)
    peers = {"PyTorch, compiled": theirs(case)}
    title = f"stage-2 step, {size.rows} × {dynamic_tokens.LENGTH}, {size.dtype}"
    return timing.compare(title, case.step, peers, rounds, case.flops, peak)


if __name__ == "__main__":
    if timing.prepare():
        main(GPU, timing.ceiling())
    else:
        main(CPU)
