"""Language models in the Hugging Face layout: LLaMA 1 to 3, Vicuna, SmolLM2, Qwen2, Qwen2.5 and Qwen3."""

from typing import Any

import numpy as np

from unimm_jax.errors import UnsupportedConfigError
from unimm_jax.interop.published import Settings
from unimm_jax.interop.table import Entry
from unimm_jax.models.language import LanguageConfig
from unimm_jax.text_tokenizer import TextTokenizer

# values of model_type
KNOWN = ("llama", "qwen2", "qwen3")


def language_config(published: dict[str, Any]) -> dict[str, Any]:
    """`LanguageConfig`'s arguments from a published `config.json`.

    Raises:
      UnsupportedConfigError: another architecture, or a setting with no counterpart here, by name.
    """
    kind = published.get("model_type")
    if kind not in KNOWN:
        raise UnsupportedConfigError(
            f"model_type {kind!r} is not known as a language model; known are {', '.join(KNOWN)}"
        )
    p = Settings(published)
    problems = []
    if p.get("hidden_act", "silu") != "silu":
        problems.append(f"hidden_act {p.get('hidden_act')!r} (silu only)")
    if p.get("use_sliding_window"):
        problems.append("use_sliding_window")
    if p.get("pretraining_tp", 1) != 1:
        problems.append(f"pretraining_tp {p.get('pretraining_tp')}")
    # since transformers 5, theta and scaling are both in rope_parameters
    rope = Settings(p.section("rope_parameters") or p.section("rope_scaling"))
    rule = rope.get("rope_type", rope.get("type", "default"))
    scaling: tuple[float, ...] = ()
    if rule == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        scaling = tuple(rope.number(name) for name in names)
    elif rule != "default":
        problems.append(f"rope scaling {rule!r} (default and llama3 only)")
    if problems:
        raise UnsupportedConfigError("this config.json cannot be represented: " + "; ".join(problems))
    width, heads = p.integer("hidden_size"), p.integer("num_attention_heads")
    kv_heads = p.integer("num_key_value_heads", heads)
    head_width = p.integer("head_dim", 128 if kind == "qwen3" else width // heads)
    if heads % kv_heads or head_width % 2:
        raise UnsupportedConfigError(
            f"config.json: {heads} heads with {kv_heads} key/value heads of width {head_width} are not possible"
        )
    biased = kind == "qwen2" or p.flag("attention_bias")
    return dict(
        width=width,
        layers=p.integer("num_hidden_layers", most=1000),
        heads=heads,
        kv_heads=kv_heads,
        head_width=head_width,
        mlp_width=p.integer("intermediate_size"),
        eps=p.number("rms_norm_eps", 1e-6),
        rope_theta=rope.number("rope_theta", p.number("rope_theta", 10000.0)),
        rope_scaling=scaling,
        biases="" if not biased else "qkv" if kind == "qwen2" else "qkvo",
        mlp_bias=p.flag("mlp_bias"),
        qk_norm=kind == "qwen3",
        tied=p.flag("tie_word_embeddings"),
    )


def published_config(
    c: LanguageConfig, rows: int, text_tokenizer: TextTokenizer | None, dtype: np.dtype
) -> dict[str, Any]:
    """The `config.json` of a decoder in LLaMA's, Qwen2's or Qwen3's class; the inverse of `language_config`.

    Args:
      rows: rows of the embedding.

    Raises:
      UnsupportedConfigError: no published class has this combination of parts.
    """
    if c.qk_norm and c.biases in ("", "qkvo") and not c.mlp_bias:
        kind, name = "qwen3", "Qwen3ForCausalLM"
    elif c.biases == "qkv" and not c.qk_norm and not c.mlp_bias:
        kind, name = "qwen2", "Qwen2ForCausalLM"
    elif c.biases in ("", "qkvo") and not c.qk_norm:
        kind, name = "llama", "LlamaForCausalLM"
    else:
        raise UnsupportedConfigError(
            f"no class of transformers has biases {c.biases!r}, mlp_bias {c.mlp_bias} and qk_norm {c.qk_norm} together"
        )
    rope: dict[str, Any] = {"rope_theta": c.rope_theta, "rope_type": "default"}
    if c.rope_scaling:
        factor, low, high, original = c.rope_scaling
        rope |= dict(rope_type="llama3", factor=factor, low_freq_factor=low, high_freq_factor=high)
        rope["original_max_position_embeddings"] = int(original)
    config = dict(
        model_type=kind,
        architectures=[name],
        vocab_size=rows,
        hidden_size=c.width,
        intermediate_size=c.mlp_width,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads,
        head_dim=c.head_width,
        rms_norm_eps=c.eps,
        hidden_act="silu",
        max_position_embeddings=2048,
        tie_word_embeddings=c.tied,
        rope_parameters=rope,
        rope_theta=c.rope_theta,
        dtype=dtype.name,
        bos_token_id=text_tokenizer.bos if text_tokenizer else None,
        eos_token_id=text_tokenizer.eos if text_tokenizer else None,
        pad_token_id=text_tokenizer.pad if text_tokenizer else None,
    )
    if kind != "qwen2":
        config["attention_bias"] = c.biases == "qkvo"
    if kind == "llama":
        config["mlp_bias"] = c.mlp_bias
    return config


def language(c: LanguageConfig, text: int, visual: int, ours: str = "language/", theirs: str = "") -> list[Entry]:
    """Table of a decoder.

    Args:
      text: rows of the text part. visual: used rows of the visual part; 0 if the foreign model has text only.
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
    table.append(Entry(f"{layer}/attention/o/kernel", f"{name}.self_attn.o_proj.weight", "output", c.layers))
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
