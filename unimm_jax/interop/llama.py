"""Language models in the Hugging Face layout: LLaMA 1 to 3, Vicuna, SmolLM2, Qwen2, Qwen2.5 and Qwen3."""

from typing import Any

from unimm_jax.interop.table import Entry

# model_type → what its layers carry besides LLaMA's.
KNOWN = ("llama", "qwen2", "qwen3")


class Unsupported(ValueError):
    """A published config that cannot be represented here; the message names the setting."""


def language_config(published: dict[str, Any]) -> dict[str, Any]:
    """`LanguageConfig`'s arguments from a published `config.json`.

    Raises:
      Unsupported: another architecture, or a setting with no counterpart here, by name.
    """
    kind = published.get("model_type")
    if kind not in KNOWN:
        raise Unsupported(f"model_type {kind!r} is not known as a language model; known are {', '.join(KNOWN)}")
    problems = []
    if published.get("hidden_act", "silu") != "silu":
        problems.append(f"hidden_act {published['hidden_act']!r} (silu only)")
    if published.get("use_sliding_window"):
        problems.append("use_sliding_window")
    if published.get("pretraining_tp", 1) != 1:
        problems.append(f"pretraining_tp {published['pretraining_tp']}")
    # Since transformers 5 the theta stands beside the scaling, in rope_parameters.
    rope = published.get("rope_parameters") or published.get("rope_scaling") or {}
    rule = rope.get("rope_type", rope.get("type", "default"))
    scaling: tuple[float, ...] = ()
    if rule == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        scaling = tuple(float(rope[n]) for n in names)
    elif rule != "default":
        problems.append(f"rope scaling {rule!r} (default and llama3 only)")
    if problems:
        raise Unsupported("this config.json cannot be represented: " + "; ".join(problems))
    heads = published["num_attention_heads"]
    biased = kind == "qwen2" or published.get("attention_bias", False)
    return dict(
        width=published["hidden_size"],
        layers=published["num_hidden_layers"],
        heads=heads,
        kv_heads=published.get("num_key_value_heads") or heads,
        head_width=published.get("head_dim") or published["hidden_size"] // heads,
        mlp_width=published["intermediate_size"],
        eps=published.get("rms_norm_eps", 1e-6),
        rope_theta=float(rope.get("rope_theta", published.get("rope_theta", 10000.0))),
        rope_scaling=scaling,
        biases="" if not biased else "qkv" if kind == "qwen2" else "qkvo",
        mlp_bias=bool(published.get("mlp_bias", False)),
        qk_norm=kind == "qwen3",
        tied=bool(published.get("tie_word_embeddings", False)),
    )


def language(c: Any, text: int, visual: int, ours: str = "language/", theirs: str = "") -> list[Entry]:
    """Table of a decoder.

    Args:
      c: `LanguageConfig`. text: rows of the text part. visual: used rows of the visual part; 0 when the foreign model
        has text alone.
    """
    layer, name = f"{ours}layers", theirs + "model.layers.{}"
    table = [Entry(f"{ours}embed_text", f"{theirs}model.embed_tokens.weight", rows=(0, text))]
    if visual:
        table.append(Entry(f"{ours}embed_visual", f"{theirs}model.embed_tokens.weight", rows=(text, text + visual)))
    for part in "qkv":
        their = f"{name}.self_attn.{part}_proj"
        table.append(Entry(f"{layer}/attention/{part}/kernel", f"{their}.weight", "heads", c.layers))
        if part in c.biases:
            table.append(Entry(f"{layer}/attention/{part}/bias", f"{their}.bias", "heads_bias", c.layers))
    table.append(Entry(f"{layer}/attention/o/kernel", f"{name}.self_attn.o_proj.weight", "merge", c.layers))
    if "o" in c.biases:
        table.append(Entry(f"{layer}/attention/o/bias", f"{name}.self_attn.o_proj.bias", layers=c.layers))
    if c.qk_norm:
        for part in "qk":
            table.append(
                Entry(f"{layer}/attention/{part}_norm/scale", f"{name}.self_attn.{part}_norm.weight", layers=c.layers)
            )
    for part in ("gate", "up", "down"):
        table.append(Entry(f"{layer}/{part}/kernel", f"{name}.mlp.{part}_proj.weight", "linear", c.layers))
        if c.mlp_bias:
            table.append(Entry(f"{layer}/{part}/bias", f"{name}.mlp.{part}_proj.bias", layers=c.layers))
    table.append(Entry(f"{layer}/norm1/scale", f"{name}.input_layernorm.weight", layers=c.layers))
    table.append(Entry(f"{layer}/norm2/scale", f"{name}.post_attention_layernorm.weight", layers=c.layers))
    table.append(Entry(f"{ours}norm/scale", f"{theirs}model.norm.weight"))
    if not c.tied:
        table.append(Entry(f"{ours}head_text", f"{theirs}lm_head.weight", rows=(0, text)))
        if visual:
            table.append(Entry(f"{ours}head_visual", f"{theirs}lm_head.weight", rows=(text, text + visual)))
    return table
