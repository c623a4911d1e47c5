"""Draws pictures from prompts and answers questions about pictures.

python -m unimm_jax.generate --checkpoint=runs/stage3 --prompt="two red circles" --output=out
python -m unimm_jax.generate --checkpoint=runs/stage3 --image=a.png --prompt="how many circles are there?"
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx
from ml_collections import ConfigDict

from unimm_jax import main as process
from unimm_jax import sharding
from unimm_jax import vocabulary as vocab
from unimm_jax.checkpoint import find, read_meta, read_params
from unimm_jax.data import transforms
from unimm_jax.models.vit import normalize_pixels
from unimm_jax.objectives.denoising import Denoising, PixelDecoding
from unimm_jax.objectives.language_modeling import LanguageModeling
from unimm_jax.pretokenize import open_tokenizer, text_of
from unimm_jax.text import TextTokenizer
from unimm_jax.vocabulary import Vocabulary

NEVER = -1e30
DECODERS = {"detokenizer": PixelDecoding, "unet": Denoising, "unet_high": Denoising}  # the first that is there draws


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
      guidance: s in log p = lu + s (lc - lu) on log-softmaxed logits, before the structural mask; 1 is without.
      temperature: 0 takes the likeliest. top_k: 0 is all. top_p: 1 is all.
    """

    guidance: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1 or self.guidance < 0:
            raise ValueError(f"temperature, top_k and guidance must be at least 0, top_p in (0, 1]: {self}")


def pick(logits_BV: jax.Array, keys_B: jax.Array, s: Sampling) -> jax.Array:
    """Draws one id a row from logits that already carry guidance and mask: int32 [B]."""
    if s.temperature == 0:
        return logits_BV.argmax(-1).astype(jnp.int32)
    logits_BV = logits_BV / s.temperature
    if s.top_k:
        floor = jax.lax.top_k(logits_BV, min(s.top_k, logits_BV.shape[-1]))[0][..., -1:]
        logits_BV = jnp.where(logits_BV < floor, NEVER, logits_BV)
    if s.top_p < 1:
        ordered = -jnp.sort(-logits_BV, -1)
        probs = jax.nn.softmax(ordered, -1)
        inside = jnp.cumsum(probs, -1) - probs < s.top_p  # the likeliest always is
        floor = jnp.where(inside, ordered, jnp.inf).min(-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < floor, NEVER, logits_BV)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


def image_mask(v: Vocabulary, last_B: jax.Array, place_B: jax.Array, count_B: jax.Array, patches: int, fixed: bool):
    """Which ids may follow inside a picture, boolean [B, V].

    Grid: position, code, position, …; positions ascend; [/IMG] after a code. Order: codes, then [/IMG]. With `fixed`,
    exactly `patches` codes. Full pictures must end.

    Args:
      last_B: the previous id. place_B: the last position (-1 before the first). count_B: codes so far.
    """
    kinds = jnp.asarray(v.kinds())[None]
    ids = jnp.arange(v.size)[None]
    full = count_B[:, None] >= patches
    if v.patches:
        wants_code = (last_B >= v.first_position)[:, None]
        later = (kinds == vocab.POSITION) & (ids - v.first_position > place_B[:, None])
        end = (kinds == vocab.END) & (count_B[:, None] > 0)
        return jnp.where(wants_code, kinds == vocab.CODE, end | later)
    end_now = full if fixed else full | (count_B[:, None] > 0)
    return ((kinds == vocab.CODE) & ~full) | ((kinds == vocab.END) & end_now)


@dataclasses.dataclass(frozen=True)
class Decoding:
    """The program of a unified model that reads prompts and writes on, to be jitted; one shape serves all prompts.

    Attributes:
      patches: codes a picture has at most. fixed: it has exactly as many.
      answer_length: tokens an answer takes at most.
    """

    objective: LanguageModeling
    vocabulary: Vocabulary
    text: TextTokenizer
    patches: int
    fixed: bool
    answer_length: int = 40

    @property
    def drawing_steps(self) -> int:
        """Tokens that a picture takes at most, its end included."""
        return self.patches * (2 if self.vocabulary.patches else 1) + 1

    def __call__(self, params, tokens_BT, valid_BT, feature_index_BT, images, keep_BP, keys_B, drawing, sampling):
        """Prefills the prompts (left-padded) and draws token by token: int32 [B, steps].

        Drawing with guidance runs a second stream that sees [IMG] alone; it reads no pictures.
        """
        v, model = self.vocabulary, self.objective.module(params)
        dtype = self.objective.dtype
        guided = drawing and sampling.guidance != 1
        steps = self.drawing_steps if drawing else self.answer_length
        b, t = tokens_BT.shape
        if drawing:
            x_BTD = model.language.embed(tokens_BT, dtype)
        else:
            rows = model.features(normalize_pixels(images, dtype), keep_BP)
            x_BTD = model.inputs(tokens_BT, feature_index_BT, rows[:, None])
        if guided:
            x_BTD = jnp.concatenate([x_BTD, x_BTD])
            alone = jnp.zeros_like(valid_BT).at[:, -1].set(True)
            valid_BT = jnp.concatenate([valid_BT, alone])
        n = x_BTD.shape[0]
        positions = jnp.maximum(jnp.cumsum(valid_BT, -1) - 1, 0)
        slots = jnp.concatenate([valid_BT, jnp.zeros((n, steps), bool)], 1)
        causal = jnp.arange(t)[:, None] >= jnp.arange(t + steps)[None]
        # a padded query reads itself only, so that no row of the softmax is empty
        mask = (slots[:, None] & causal) | jnp.eye(t, t + steps, dtype=bool)
        extend, cache = model.language.incremental(n, t + steps, dtype)
        hidden, cache = extend(x_BTD, positions, mask, cache, 0)
        head = model.language.head(dtype).T  # once, as the products of the loop read it
        kinds = jnp.asarray(v.kinds())
        # [/IMG] and </s> end; a text may not hold padding or a second beginning
        banned = [i for i in {self.text.pad, self.text.bos} if i is not None and i != self.text.eos]
        banned += range(self.text.words, self.text.size)
        text_only = (kinds == vocab.TEXT).at[jnp.asarray(banned, jnp.int32)].set(False)[None]

        def next_logits(hidden_ND):
            logits = jnp.einsum("nd,dv->nv", hidden_ND, head, preferred_element_type=jnp.float32)
            logp = jax.nn.log_softmax(jnp.where(kinds == vocab.PADDING, NEVER, logits), -1)
            if guided:
                conditional, free = jnp.split(logp, 2)
                logp = free + sampling.guidance * (conditional - free)
            return logp

        def body(carry, index):
            hidden, cache, slots, last, place, count, done = carry
            logp = next_logits(hidden)
            if drawing:
                legal = image_mask(v, last, place, count, self.patches, self.fixed)
            else:
                legal = text_only
            keys = jax.vmap(jax.random.fold_in, (0, None))(keys_B, index)
            token = pick(jnp.where(legal, logp, NEVER), keys, sampling)
            token = jnp.where(done, v.end if drawing else self.text.eos, token)
            done = done | (token == (v.end if drawing else self.text.eos))
            place = jnp.where((token >= v.first_position), token - v.first_position, place)
            count = count + (kinds[token] == vocab.CODE)
            slots = jax.lax.dynamic_update_slice_in_dim(slots, jnp.ones((n, 1), bool), t + index, 1)
            both = jnp.concatenate([token, token]) if guided else token
            x = model.language.embed(both[:, None], dtype)
            at = positions[:, -1:] + 1 + index
            hidden, cache = extend(x, at, slots[:, None], cache, t + index)
            return (hidden[:, 0], cache, slots, token, place, count, done), token

        zero = jnp.zeros((b,), jnp.int32)
        start = (hidden[:, -1], cache, slots, zero + v.start, zero - 1, zero, zero > 0)
        return jax.lax.scan(body, start, jnp.arange(steps))[1].T


class Generator:
    """A trained unified model with its tokenizer and pixel decoders, ready to draw and to answer.

    Args (constructor):
      checkpoint: workdir (or step directory) of a language stage.
      batch: pictures or questions at a time; part of the compiled shape.
      prompt_length: tokens a prompt takes at most, picture features included; 0 is a picture and 32 words, at least 64.
      answer_length: tokens an answer takes at most.
      tensor: devices over which the language model is split; tokenizer and decoders stay on the first.

    Raises (constructor):
      ValueError: no such checkpoint, fewer devices, or companions that belong to another tokenizer.
    """

    def __init__(
        self,
        checkpoint: str | pathlib.Path,
        batch: int = 32,
        prompt_length: int = 0,
        answer_length: int = 40,
        tensor: int = 1,
    ):
        step = find(checkpoint)
        meta = read_meta(step)
        self.config = config = ConfigDict(json.loads(meta["config"]))
        if config.get("objective") != "language_modeling" or not config.data.row_pictures:
            raise ValueError(
                f"{checkpoint} is a checkpoint of {config.name}, which sees no pictures with its language model; give "
                "one of stage 1, 2 or 3"
            )
        self.header = meta["data"]
        self.text = text_of(meta, checkpoint)
        grid = self.header["positions"] == "grid" and self.header["selection"] != "all"
        self.vocabulary = Vocabulary(self.text.size, self.header["codes"], self.header["patches"] if grid else 0)
        self.objective = LanguageModeling(config, self)
        if tensor > jax.local_device_count():
            raise ValueError(f"the model cannot be split over {tensor} devices, here are {jax.local_device_count()}")
        self._mesh = sharding.make_mesh((1, 1, tensor), jax.local_devices()[:tensor])
        shards = sharding.param_shardings(self.objective.abstract, self._mesh)
        self.params = read_params(step, dict(sharding.flatten(shards)))
        self.budget: int = config.model.unified.budget
        picture = self.budget * (2 if grid else 1)
        self.batch = batch
        self.prompt_length = prompt_length or max(64, picture + 32)
        home = step.parent.parent if step.parent.name == "checkpoints" else step.parent
        places = {k: (home / v).resolve() for k, v in config.companions.items()}
        self.tokenizer_config, graph, self.tokenizer_params, fingerprint = open_tokenizer(places["tokenizer"])
        if fingerprint != self.header["fingerprint"]:
            raise ValueError(
                f"the tokenizer in {places['tokenizer']} is not the one that {checkpoint} was trained with "
                f"(fingerprints {fingerprint} and {self.header['fingerprint']})"
            )
        self._tokenizer = lambda params: nnx.merge(graph, params)
        self.decoders = {}
        for name, kind in DECODERS.items():
            if name in places and (places[name] / "checkpoints").exists():
                config_of = ConfigDict(json.loads(read_meta(places[name])["config"]))
                self.decoders[name] = (kind(config_of, None), read_params(places[name]))
        self._encode = jax.jit(lambda p, x: self._tokenizer(p).encode(normalize_pixels(x)))
        self._encode_kept = jax.jit(self._codes_of)
        most, fixed = min(self.header["patches"], self.budget), self.header["selection"] == "all"
        decoding = Decoding(self.objective, self.vocabulary, self.text, most, fixed, answer_length)
        self._run = jax.jit(decoding, static_argnames=("drawing", "sampling"))

    def _codes_of(self, params, images_and_keep):
        images, keep = images_and_keep
        tokenizer = self._tokenizer(params)
        return keep, tokenizer.codes_of(tokenizer.encoder(normalize_pixels(images)), keep)

    # ---- Drawing -------------------------------------------------------------------------------------------------

    def draw_ids(self, prompts: Sequence[str], sampling: Sampling = Sampling(), seed: int = 0) -> np.ndarray:
        """Visual ids for each prompt, int32 [N, steps] ([/IMG] and after it are padding).

        A prompt's ids depend on it, the seed and its index, not on what shares its batch.

        Raises:
          ValueError: a prompt longer than `prompt_length`.
        """
        bos = [] if self.text.bos is None else [self.text.bos]
        rows = [[*bos, *self.text.encode(p), self.vocabulary.start] for p in prompts]
        return self._batches(rows, None, None, None, True, sampling, seed)

    def codes(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Visual ids → (codes int32 [N, P], keep boolean [N, P])."""
        found = [self.vocabulary.read_image(row, self.header["patches"]) for row in ids]
        return np.stack([c for c, _ in found]), np.stack([k for _, k in found])

    def decode(
        self,
        codes: np.ndarray,
        keep: np.ndarray,
        decoder: str = "",
        seed: int = 0,
        size: tuple[int, int] | None = None,
    ) -> np.ndarray:
        """Codes → pictures uint8 [N, H, W, 3].

        Args:
          decoder: "detokenizer" (direct), "unet" (diffusion) or "unet_high" (SDXL); the first that is there if empty.
          size: (H, W) of a diffusion's pictures; its configured square if None.

        Raises:
          ValueError: no such decoder, or a size that it cannot draw.
        """
        decoder = decoder or next(iter(self.decoders), "detokenizer")
        if decoder not in self.decoders:
            raise ValueError(f"no {decoder} stands beside this model; there is {', '.join(self.decoders) or 'none'}")
        objective, params = self.decoders[decoder]
        if size is not None:
            unit = objective.size_unit
            if not unit:
                raise ValueError("the direct decoder draws one size; other sizes need --decoder=unet")
            if size[0] % unit or size[1] % unit or min(size) < unit:
                raise ValueError(f"a picture of {size[1]}x{size[0]} cannot be drawn; width and height go by {unit}")
        drawn = []
        for at in range(0, len(codes), self.batch):
            part = [_pad(x[at : at + self.batch], self.batch) for x in (codes, keep)]
            more = {} if size is None else {"size": size}
            drawn.append(np.asarray(objective.draw(params, *part, jax.random.key(seed + at), **more)))
        return np.concatenate(drawn)[: len(codes)]

    def draw(self, prompts: Sequence[str], sampling: Sampling = Sampling(), seed: int = 0) -> np.ndarray:
        """Prompts → pictures uint8 [N, S, S, 3]."""
        return self.decode(*self.codes(self.draw_ids(prompts, sampling, seed)), seed=seed)

    # ---- Reading -------------------------------------------------------------------------------------------------

    def tokenize(self, images: np.ndarray, keep: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Pictures uint8 [N, S, S, 3] → (codes int32 [N, P], keep boolean [N, P]).

        Args:
          keep: keep masks to use instead of the selector's.
        """
        x = images if keep is None else (images, keep)
        keeps, codes = [], []
        for at in range(0, len(images), self.batch):
            part = jax.tree.map(lambda array, at=at: _pad(array[at : at + self.batch], self.batch), x)
            k, c = (self._encode if keep is None else self._encode_kept)(self.tokenizer_params, part)
            keeps.append(np.asarray(k))
            codes.append(np.asarray(c))
        return np.concatenate(codes)[: len(images)], np.concatenate(keeps)[: len(images)]

    def answer(self, images: np.ndarray, questions: Sequence[str], sampling: Sampling = Sampling(temperature=0)):
        """Answers one question a picture; an empty question asks for a caption. Greedy by default.

        Args:
          images: uint8 [N, S, S, 3].
        """
        _, keep = self.tokenize(images)
        rows, features = [], []
        for mask, question in zip(keep, questions, strict=True):
            ids, places = self.vocabulary.place_features(np.flatnonzero(mask)[: self.budget])
            words = self.text.encode(question) if question else ()
            rows.append([self.vocabulary.start, *ids, self.vocabulary.end, *words])
            features.append([-1, *places, *[-1] * (1 + len(words))])
        found = self._batches(rows, features, images, keep, False, sampling, 0)
        return [self.text.decode(_until(row, self.text.eos)) for row in found]

    def _batches(self, rows, features, images, keep, drawing: bool, sampling: Sampling, seed: int) -> np.ndarray:
        longest = max(map(len, rows))
        if longest > self.prompt_length:
            raise ValueError(f"a prompt has {longest} tokens, this generator was made for {self.prompt_length}")
        tokens = np.zeros((len(rows), self.prompt_length), np.int32)
        valid = np.zeros(tokens.shape, bool)
        index = np.full(tokens.shape, -1, np.int32)
        for i, row in enumerate(rows):
            tokens[i, -len(row) :], valid[i, -len(row) :] = row, True
            if features is not None:
                index[i, -len(row) :] = features[i]
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(len(rows)))
        if images is None:
            size = self.config.data.image_size
            images = (
                np.zeros((len(rows), size, size, 3), np.uint8) if not drawing else np.zeros((len(rows), 0), np.uint8)
            )
            keep = np.zeros((len(rows), 0), bool)
        found = []
        for at in range(0, len(rows), self.batch):
            cut = slice(at, at + self.batch)
            arrays = [_pad(x[cut], self.batch) for x in (tokens, valid, index, images, keep)]
            part = keys[np.minimum(np.arange(at, at + self.batch), len(rows) - 1)]
            with jax.set_mesh(self._mesh):
                found.append(np.asarray(self._run(self.params, *arrays, part, drawing=drawing, sampling=sampling)))
        return np.concatenate(found)[: len(rows)]


def _pad(x: np.ndarray, size: int) -> np.ndarray:
    """Repeats the last row up to `size` rows."""
    return x if len(x) == size else np.concatenate([x, np.repeat(x[-1:], size - len(x), 0)])


def _until(ids: np.ndarray, stop: int) -> list[int]:
    found = ids.tolist()
    return found[: found.index(stop)] if stop in found else found


def main(_: list[str]) -> None:
    """Runs the command."""
    process.quiet()
    process.run(command)


def command() -> None:
    """Draws or answers as the flags say."""
    f = flags.FLAGS
    generator = Generator(f.checkpoint, batch=max(1, min(f.samples, 32)), tensor=f.tensor)
    if f.image:
        file = pathlib.Path(f.image)
        if not file.exists():
            raise ValueError(f"there is no picture {file}")
        pixels = transforms.to_pixels(file.read_bytes(), generator.config.data.image_size)
        print(generator.answer(pixels[None], [f.prompt])[0])
        return
    if not f.prompt:
        raise ValueError("give --prompt to draw, or --image to describe a picture")
    sampling = Sampling(f.guidance, f.temperature, f.top_k, f.top_p)
    codes, keep = generator.codes(generator.draw_ids([f.prompt] * f.samples, sampling, f.seed))
    size = (int(f.height), int(f.width)) if f.height and f.width else None
    pictures = generator.decode(codes, keep, f.decoder, f.seed, size)
    folder = pathlib.Path(f.output)
    folder.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(pictures):
        (folder / f"{i:04d}.png").write_bytes(transforms.encode_png(picture))
    print(f"{len(pictures)} pictures in {folder}")


if __name__ == "__main__":
    process.prepare_process()
    flags.DEFINE_string("checkpoint", None, "Workdir of a language stage.", required=True)
    flags.DEFINE_string("prompt", "", "What to draw, or what to ask about --image (empty: describe it).")
    flags.DEFINE_string("image", "", "A picture to answer about.")
    flags.DEFINE_string("output", "samples", "Folder for the pictures.")
    flags.DEFINE_integer("tensor", 1, "Devices over which the language model is split.", lower_bound=1)
    flags.DEFINE_integer("samples", 4, "Pictures to draw.", lower_bound=1)
    flags.DEFINE_float("guidance", 1.0, "Classifier-free guidance; 1 is without.")
    flags.DEFINE_float("temperature", 1.0, "0 takes the likeliest token.")
    flags.DEFINE_integer("top_k", 0, "Tokens to draw from; 0 is all.")
    flags.DEFINE_float("top_p", 1.0, "Nucleus to draw from; 1 is all.")
    flags.DEFINE_integer("seed", 0, "Seed of the drawing.")
    flags.DEFINE_enum("decoder", "", ["", *DECODERS], "What draws; the first of these that stands beside the model.")
    flags.DEFINE_integer("height", 0, "Height of the pictures, where a U-Net draws; 0 is its own size.")
    flags.DEFINE_integer("width", 0, "Width of the pictures, where a U-Net draws; 0 is its own size.")
    app.run(main)
