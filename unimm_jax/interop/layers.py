"""Entries of common layers, from which the tables of names are built."""

from unimm_jax.interop.table import Entry


def norm(ours: str, theirs: str, layers: int = 0) -> list[Entry]:
    """A LayerNorm."""
    return [
        Entry(f"{ours}/scale", f"{theirs}.weight", layers=layers),
        Entry(f"{ours}/bias", f"{theirs}.bias", layers=layers),
    ]


def linear(ours: str, theirs: str, layers: int = 0) -> list[Entry]:
    """A linear layer with a bias."""
    return [
        Entry(f"{ours}/kernel", f"{theirs}.weight", "linear", layers),
        Entry(f"{ours}/bias", f"{theirs}.bias", layers=layers),
    ]


def fused_attention(ours: str, theirs: str, layers: int, biases: str = "qkv") -> list[Entry]:
    """Self-attention whose q, k and v are one tensor.

    Args:
      biases: "qkv" is one fused bias; otherwise the projections that have a bias of their own.
    """
    found = []
    for index, name in enumerate("qkv"):
        found.append(Entry(f"{ours}/{name}/kernel", f"{theirs}.qkv.weight", "heads", layers, part=(index, 3)))
        if biases == "qkv":
            found.append(Entry(f"{ours}/{name}/bias", f"{theirs}.qkv.bias", "heads_bias", layers, part=(index, 3)))
        elif name in biases:
            found.append(Entry(f"{ours}/{name}/bias", f"{theirs}.{name}_bias", "heads_bias", layers))
    return found + output(f"{ours}/o", f"{theirs}.proj", layers)


def output(ours: str, theirs: str, layers: int = 0) -> list[Entry]:
    """The output projection of an attention."""
    return [
        Entry(f"{ours}/kernel", f"{theirs}.weight", "output", layers),
        Entry(f"{ours}/bias", f"{theirs}.bias", layers=layers),
    ]


def attention(
    ours: str, theirs: str, layers: int, names: tuple[str, str, str, str] = ("query", "key", "value", "proj")
) -> list[Entry]:
    """Attention with separate linear layers of the given names."""
    found = []
    for mine, their in zip("qkv", names, strict=False):
        found.append(Entry(f"{ours}/{mine}/kernel", f"{theirs}.{their}.weight", "heads", layers))
        found.append(Entry(f"{ours}/{mine}/bias", f"{theirs}.{their}.bias", "heads_bias", layers))
    return found + output(f"{ours}/o", f"{theirs}.{names[3]}", layers)


def mlp(ours: str, theirs: str, layers: int) -> list[Entry]:
    """Two linear layers, fc1 and fc2."""
    return linear(f"{ours}/up", f"{theirs}.fc1", layers) + linear(f"{ours}/down", f"{theirs}.fc2", layers)


def patches(ours: str, theirs: str, bias: bool = True) -> list[Entry]:
    """A patch embedding that is stored as a convolution."""
    kernel = Entry(f"{ours}/kernel", f"{theirs}.weight", "patch")
    return [kernel, Entry(f"{ours}/bias", f"{theirs}.bias")] if bias else [kernel]
