"""What describes the published layout of a vision encoder."""

import dataclasses
import math
import pathlib
import re
from collections.abc import Callable
from typing import Any

from unimm_jax.errors import UnsupportedConfigError
from unimm_jax.interop.published import Settings, read_json
from unimm_jax.interop.table import Entry

ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh"}
CLIP_PIXELS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF_PIXELS = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
# names of the vision tower, which a file of that tower alone may write without "vision_model."
_TOWER = re.compile(r"(embeddings|encoder\.layers|pre_layrnorm|post_layernorm|head)\b")


@dataclasses.dataclass(frozen=True)
class EncoderLayout:
    """A published layout.

    Attributes:
      model_types: values of `model_type` in `config.json` that mean this layout.
      table: (number of blocks, `ViTConfig.biases`, prefix of our paths) → table of names.
      unused: regex of the names that a file may have beyond the table (full match).
      defaults: values of settings that a published config leaves out.
      arguments: published settings → those arguments of `ViTConfig` that are particular to the layout.
      pixels: (mean, std) of the pixels in [0, 1], used if there is no preprocessor_config.json.
      tower: names start with "vision_model.", which a file may leave out.
    """

    model_types: tuple[str, ...]
    table: Callable[[int, str, str], list[Entry]]
    unused: str
    defaults: dict[str, Any]
    arguments: Callable[[Settings], dict[str, Any]]
    pixels: tuple[tuple[float, ...], tuple[float, ...]] = CLIP_PIXELS
    tower: bool = False

    def vit_config(self, published: dict[str, Any], source: pathlib.Path | None = None) -> dict[str, Any]:
        """`ViTConfig`'s arguments.

        Args:
          published: `config.json`; its `vision_config` is read if it describes a text tower, too.
          source: directory or file of the weights; the pixel statistics are read from the preprocessor config there.

        Raises:
          UnsupportedConfigError: a setting without a counterpart here, by name.
        """
        p = Settings(Settings(published).section("vision_config") or published, self.defaults)
        activation = p.get("hidden_act", "gelu")
        if not isinstance(activation, str) or activation not in ACTIVATIONS:
            raise UnsupportedConfigError(
                f"this config.json cannot be represented: hidden_act {activation!r} (known: {', '.join(ACTIVATIONS)})"
            )
        if p.integer("num_channels", 3) != 3:
            raise UnsupportedConfigError(
                f"this config.json cannot be represented: num_channels {p.get('num_channels')} (3 only)"
            )
        width = p.integer("hidden_size")
        mean, std = (source and pixel_statistics(source)) or self.pixels
        shape: dict[str, Any] = dict(
            image_size=p.integer("image_size"),
            patch_size=p.integer("patch_size"),
            width=width,
            depth=p.integer("num_hidden_layers", most=1000),
            heads=p.integer("num_attention_heads"),
            mlp_width=p.integer("intermediate_size", int(width * p.number("mlp_ratio", 4))),
            activation=ACTIVATIONS[activation],
            eps=p.number("layer_norm_eps", 1e-6),
            biases="qkv",
            pixel_mean=tuple(mean),
            pixel_std=tuple(std),
        ) | self.arguments(p)
        for whole, part in (("image_size", "patch_size"), ("width", "heads")):
            if shape[whole] % shape[part]:
                raise UnsupportedConfigError(
                    f"config.json: {whole} {shape[whole]} is not a multiple of {part} {shape[part]}"
                )
        return shape

    def full_name(self, name: str) -> str:
        """A tensor's name with the "vision_model." that a file of the vision tower alone may leave out."""
        return f"vision_model.{name}" if self.tower and _TOWER.match(name) else name

    def is_unused(self, name: str) -> bool:
        """Whether a tensor of a file may be left out."""
        return re.fullmatch(self.unused, name) is not None


def pixel_statistics(source: pathlib.Path) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """(mean, std) of `preprocessor_config.json` or `processor_config.json` beside the weights; None without one.

    Raises:
      WeightsFileError: the file cannot be read.
      UnsupportedConfigError: values that are not three numbers, or pixels that are not scaled to [0, 1].
    """
    folder = source if source.is_dir() else source.parent
    for name in ("preprocessor_config.json", "processor_config.json"):
        if not (folder / name).exists():
            continue
        found = read_json(folder / name)
        found = Settings(found).section("image_processor") or found
        if "image_mean" not in found and "image_std" not in found:
            continue
        scale = found.get("rescale_factor", 1 / 255)
        if not found.get("do_rescale", True) or not isinstance(scale, int | float) or abs(scale * 255 - 1) > 1e-6:
            raise UnsupportedConfigError(f"{folder / name}: pixels must be scaled by 1/255")
        if not found.get("do_normalize", True):
            return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        return _three(folder / name, found, "image_mean"), _three(folder / name, found, "image_std")
    return None


def _three(file: pathlib.Path, found: dict[str, Any], name: str) -> tuple[float, ...]:
    value = found.get(name)
    numbers = isinstance(value, list) and len(value) == 3 and all(type(x) in (int, float) for x in value)
    if not numbers or not all(math.isfinite(x) and (x > 0 or name == "image_mean") for x in value or ()):
        raise UnsupportedConfigError(f"{file}: {name} is {value!r}; three numbers are needed")
    return tuple(map(float, value or ()))
