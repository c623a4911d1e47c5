"""The stage-2 step against PyTorch's: frozen encoder, trained merger and adapter, language model on packed rows.

python -m benchmarks.stage2_step

Rows of 2,048 tokens with [image, text] and [text, image] pairs of dynamic length (`benchmarks.dynamic_tokens`), AdamW.
On a GPU a language model of 1.1 billion parameters (TinyLlama's shape) behind a ViT-B/14, computing in bfloat16 with
float32 parameters (PyTorch by autocast), with the share that each side reaches of a measured matrix product. On a
processor float32 and 20 million parameters.

The peer is `transformers`' ViT and LlamaForCausalLM (SDPA) with the exported model's merger between them, all under
`torch.compile`. Its merger computes all 256 rows of a picture, as LaVIT's own does. It gets the same rows, pictures and
targets; its attention is causal over whole rows, which spares it the mask of packed segments.
"""

import dataclasses

import numpy as np
import torch

from benchmarks import dynamic_tokens, lm_step, timing, tokenizer_forward, vit
from unimm_jax.objectives.base import models

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
    """The same parts; `forward` gives the loss."""

    def __init__(self, parts: dict, ids: int):
        super().__init__()
        encoder, language, shape = parts["encoder"], parts["language"], parts["tokenizer"]
        self.encoder = vit.peer_model(encoder).requires_grad_(False)
        self.merger = tokenizer_forward.peer_module().Merger(encoder.width, tokenizer_forward.peer_settings(shape))
        self.adapter = torch.nn.Linear(encoder.width, language.width)
        self.language = lm_step.peer_model(language, ids, use_cache=False)

    def forward(self, images, keep, tokens, where, source, labels):
        """Pictures [N, 3, H, W] and masks [N, P]; tokens and labels [B, T]; merged row `source` stands at `where`."""
        with torch.no_grad():
            features = self.encoder(images).last_hidden_state[:, 1:]
        rows = self.adapter(self.merger.dense(features, keep)).flatten(0, 1)
        x = self.language.get_input_embeddings()(tokens)
        x = x.flatten(0, 1).index_put((where,), rows[source].to(x.dtype)).view_as(x)
        return self.language(inputs_embeds=x, labels=labels).loss


def sources(case: dynamic_tokens.Case) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the flattened rows that hold features, and the flattened patch whose merged row each one reads."""
    keep, index = case.batch["keep"], case.batch["feature_index"]
    row, _ = np.nonzero(index >= 0)
    budget = case.config.model.unified.budget  # feature s of a picture is its s-th kept patch
    picture, nth = row * keep.shape[1] + index[index >= 0] // budget, index[index >= 0] % budget
    patch = np.argsort(~keep.reshape(-1, keep.shape[-1]), axis=1, kind="stable")[picture, nth]
    return np.flatnonzero(index >= 0), picture * keep.shape[-1] + patch


def theirs(case: dynamic_tokens.Case):
    """A function that trains one step of the peer on the case's own batch."""
    device = timing.peer_device()
    model = Peer(models(case.config), dynamic_tokens.VOCABULARY.size).to(device).train()
    batch, (where, source) = case.batch, sources(case)
    images = batch["images"].reshape(-1, *batch["images"].shape[2:])
    tensor = lambda x: torch.tensor(x, device=device)
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

    def once():
        optimizer.zero_grad()
        with timing.autocast(case.config.dtype):
            loss = forward(*arguments)
        loss.backward()
        optimizer.step()

    return timing.waited(once)


def main(size: dynamic_tokens.Sizes, peak: float = 0.0, rounds: int = 9) -> dict[str, float]:
    """Prints the comparison; `peak` is of `timing.ceiling`."""
    case = dynamic_tokens.case(dynamic_tokens.drawn_lengths(), dynamic_tokens.MOST, 12, size)
    peers = {"PyTorch, compiled": theirs(case)}
    title = f"stage-2 step, {size.rows} × {dynamic_tokens.LENGTH}, {size.dtype}"
    return timing.compare(title, case.step, peers, rounds, case.flops, peak)


if __name__ == "__main__":
    if timing.prepare():
        main(GPU, timing.ceiling())
    else:
        main(CPU)
