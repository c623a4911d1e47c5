"""Token-by-token decoding: how the next token is drawn, which tokens are legal, and the jitted loop."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from unimm_jax import vocabulary as vocab
from unimm_jax.errors import UserError
from unimm_jax.inference.beam_search import beam_search
from unimm_jax.objectives.language_modeling import LanguageModeling
from unimm_jax.text_tokenizer import TextTokenizer
from unimm_jax.vocabulary import Vocabulary

NEG_INF = -1e30


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
      guidance: s in log p = lu + s (lc - lu) on log-softmaxed logits, before the structural mask; 1 is off.
      temperature: 0 is greedy. top_k: number of tokens to choose from; 0 is all. top_p: nucleus; 1 is all.
      min_length: of texts, number of tokens before the end.
      beams: of texts, number of beams; 1 is no beam search. length_penalty: see `beam_search`.
    """

    guidance: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_length: int = 0
    beams: int = 1
    length_penalty: float = 1.0

    def __post_init__(self):
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1 or self.guidance < 0:
            raise UserError(f"temperature, top_k and guidance must be at least 0, top_p in (0, 1]: {self}")
        if self.min_length < 0 or self.beams < 1:
            raise UserError(f"min_length must be at least 0, beams at least 1: {self}")
        if self.beams > 1 and self.temperature:
            raise UserError(f"beam search does not sample; set the temperature to 0: {self}")


SAMPLED, GREEDY = Sampling(), Sampling(temperature=0)


def sample_token(logits_BV: jax.Array, keys_B: jax.Array, s: Sampling) -> jax.Array:
    """Draws one id per row from logits that include guidance and mask: int32 [B]."""
    if s.temperature == 0:
        return logits_BV.argmax(-1).astype(jnp.int32)
    logits_BV = logits_BV / s.temperature
    if s.top_k:
        floor = jax.lax.top_k(logits_BV, min(s.top_k, logits_BV.shape[-1]))[0][..., -1:]
        logits_BV = jnp.where(logits_BV < floor, NEG_INF, logits_BV)
    if s.top_p < 1:
        ordered = -jnp.sort(-logits_BV, -1)
        probs = jax.nn.softmax(ordered, -1)
        inside = jnp.cumsum(probs, -1) - probs < s.top_p  # the most likely one always is
        floor = jnp.where(inside, ordered, jnp.inf).min(-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < floor, NEG_INF, logits_BV)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


def image_mask(
    v: Vocabulary, last_B: jax.Array, position_B: jax.Array, count_B: jax.Array, patches: int, fixed: bool
) -> jax.Array:
    """Which ids may follow inside an image, boolean [B, V].

    Grid: position, code, position, …; positions ascend; [/IMG] after a code. Order: codes, then [/IMG]. With `fixed`,
    exactly `patches` codes. Full images must end.

    Args:
      last_B: the previous id. position_B: the last position (-1 before the first). count_B: codes so far.
    """
    kinds = jnp.asarray(v.kinds())[None]
    ids = jnp.arange(v.size)[None]
    full = count_B[:, None] >= patches
    if v.num_position_ids:
        wants_code = (last_B >= v.first_position)[:, None]
        later = (kinds == vocab.POSITION) & (ids - v.first_position > position_B[:, None])
        end = (kinds == vocab.END) & (count_B[:, None] > 0)
        return jnp.where(wants_code, kinds == vocab.CODE, end | later)
    end_now = full if fixed else full | (count_B[:, None] > 0)
    return ((kinds == vocab.CODE) & ~full) | ((kinds == vocab.END) & end_now)


@dataclasses.dataclass(frozen=True)
class Decoding:
    """The program of a unified model that continues prompts, to be jitted; one shape serves all prompts.

    Attributes:
      max_codes: maximum number of codes per image. fixed: every image has exactly as many.
      answer_length: maximum number of tokens per answer.
    """

    objective: LanguageModeling
    vocabulary: Vocabulary
    text_tokenizer: TextTokenizer
    max_codes: int
    fixed: bool
    answer_length: int = 40

    @property
    def image_steps(self) -> int:
        """Tokens that an image takes at most, its end included."""
        return self.max_codes * (2 if self.vocabulary.num_position_ids else 1) + 1

    def text_ids(self, index: jax.Array, min_length: int = 0, may_draw: bool = False) -> jax.Array:
        """Which ids may follow `index` ids of a text, boolean [1, V].

        No padding, no second beginning, no spare rows, and no end before `min_length` ids.

        Args:
          may_draw: whether [IMG] may follow, too; it ends the text, as </s> does.
        """
        t = self.text_tokenizer
        banned = [i for i in {t.pad, t.bos} if i is not None and i != t.eos]
        banned += range(t.vocab_size, t.num_rows)
        is_text = jnp.asarray(self.vocabulary.kinds()) == vocab.TEXT
        legal = is_text.at[jnp.asarray(banned, jnp.int32)].set(False)
        legal = legal.at[t.eos].set(legal[t.eos] & (index >= min_length))
        return (legal.at[self.vocabulary.start].set(index >= min_length) if may_draw else legal)[None]

    def __call__(
        self,
        params: Any,
        tokens_BT: jax.Array,
        valid_BT: jax.Array,
        feature_index_BT: jax.Array,
        images_BRHWC: jax.Array,
        keep_BRP: jax.Array,
        keys_N: jax.Array,
        drawing: bool,
        sampling: Sampling,
        may_draw: bool = False,
    ) -> jax.Array:
        """Prefills the prompts (left-padded) and generates token by token: int32 [N, steps] for N keys.

        It stops when all have ended; what follows an end is filled with [/IMG] (images) or </s> (texts).

        Args:
          images_BRHWC: uint8, the images that the prompts read; R may be 0. keep_BRP: their keep masks.
          keys_N: B = N; with guidance B = 2 N, and the second half are the prompts without condition.
          drawing: generate an image rather than text.
          may_draw: a text may also end with [IMG], where an image follows it; without beam search.
        """
        guided = drawing and sampling.guidance != 1
        steps = self.image_steps if drawing else self.answer_length
        images = (images_BRHWC, keep_BRP)
        read = self._read(params, tokens_BT, valid_BT, feature_index_BT, images, steps)
        if sampling.beams > 1 and not drawing:
            return self._search(read, sampling)
        v, b = self.vocabulary, tokens_BT.shape[0]
        kinds, stop = jnp.asarray(v.kinds()), v.end if drawing else self.text_tokenizer.eos

        def body(carry: Any) -> Any:
            hidden, cache, last, position, count, done, index, found_NS = carry
            logp = read.log_probs(hidden)
            if guided:
                conditional, free = jnp.split(logp, 2)
                logp = free + sampling.guidance * (conditional - free)
            if drawing:
                legal = image_mask(v, last, position, count, self.max_codes, self.fixed)
            else:
                legal = self.text_ids(index, sampling.min_length, may_draw)
            keys = jax.vmap(jax.random.fold_in, (0, None))(keys_N, index)
            token = sample_token(jnp.where(legal, logp, NEG_INF), keys, sampling)
            token = jnp.where(done, stop, token)
            done = done | (token == stop)
            if may_draw and not drawing:
                done = done | (token == v.start)
            position = jnp.where((token >= v.first_position), token - v.first_position, position)
            count = count + (kinds[token] == vocab.CODE)
            hidden, cache = read.advance(jnp.tile(token, b // len(token)), cache, index)
            found_NS = jax.lax.dynamic_update_slice_in_dim(found_NS, token[:, None], index, 1)
            return hidden, cache, token, position, count, done, index + 1, found_NS

        zero = jnp.zeros(keys_N.shape, jnp.int32)
        ended_NS = jnp.full((*keys_N.shape, steps), stop, jnp.int32)
        start = (read.hidden_BD, read.cache, zero + v.start, zero - 1, zero, zero > 0, jnp.int32(0), ended_NS)
        return jax.lax.while_loop(lambda c: (c[-2] < steps) & ~c[-3].all(), body, start)[-1]

    def _read(
        self,
        params: Any,
        tokens_BT: jax.Array,
        valid_BT: jax.Array,
        feature_index_BT: jax.Array,
        images: tuple[jax.Array, jax.Array],
        steps: int,
    ) -> "Read":
        """Prefills the prompts, with room for `steps` tokens; arguments as in `__call__`."""
        model, dtype = self.objective.module(params), self.objective.dtype
        b, t = tokens_BT.shape
        images_BRHWC, keep_BRP = images
        r = images_BRHWC.shape[1]
        if r:
            pixels = model.encoder.normalize(images_BRHWC.reshape(b * r, *images_BRHWC.shape[2:]), dtype)
            rows = model.features(pixels, keep_BRP.reshape(b * r, -1))
            x_BTD = model.inputs(tokens_BT, feature_index_BT, rows.reshape(b, r, *rows.shape[1:]))
        else:
            x_BTD = model.language.embed(tokens_BT, dtype)
        positions = jnp.maximum(jnp.cumsum(valid_BT, -1) - 1, 0)
        slots = jnp.concatenate([valid_BT, jnp.zeros((b, steps), bool)], 1)
        causal = jnp.arange(t)[:, None] >= jnp.arange(t + steps)[None]
        # a padded query reads itself only, so that no row of the softmax is empty
        mask = (slots[:, None] & causal) | jnp.eye(t, t + steps, dtype=bool)
        extend, cache = model.language.incremental(b, t + steps, dtype)
        hidden, cache = extend(x_BTD, positions, mask, cache, 0)
        head = model.language.head(dtype).T  # once, as the products of the loop read it
        is_padding = jnp.asarray(self.vocabulary.kinds() == vocab.PADDING)

        def log_probs(hidden_BD: jax.Array) -> jax.Array:
            logits = jnp.einsum("bd,dv->bv", hidden_BD, head, preferred_element_type=jnp.float32)
            return jax.nn.log_softmax(jnp.where(is_padding, NEG_INF, logits), -1)

        def advance(token_B: jax.Array, cache: Any, index: jax.Array) -> tuple[jax.Array, Any]:
            copies = len(token_B) // b  # beams of a prompt
            seen, last = jnp.repeat(slots, copies, 0), jnp.repeat(positions[:, -1:], copies, 0)
            place = jnp.arange(t + steps)
            seen = seen | ((place >= t) & (place <= t + index))
            x = model.language.embed(token_B[:, None], dtype)
            hidden, cache = extend(x, last + 1 + index, seen[:, None], cache, t + index)
            return hidden[:, 0], cache

        return Read(hidden[:, -1], cache, log_probs, advance)

    def _search(self, read: "Read", sampling: Sampling) -> jax.Array:
        """Beam search for texts after prompts: int32 [B, answer_length]."""
        n, beams = len(read.hidden_BD), sampling.beams

        def rows(state: Any, chosen: jax.Array) -> Any:
            hidden, cache = state
            # keys and values are [..., B, K, S, H]
            return hidden[chosen], jax.tree.map(lambda x: jnp.take(x, chosen, x.ndim - 4), cache)

        def log_probs(state: Any, index: jax.Array) -> jax.Array:
            return jnp.where(self.text_ids(index, sampling.min_length), read.log_probs(state[0]), -jnp.inf)

        def advance(state: Any, chosen: jax.Array, tokens: jax.Array, index: jax.Array) -> Any:
            return read.advance(tokens, rows(state, chosen)[1], index)

        start = rows((read.hidden_BD, read.cache), jnp.repeat(jnp.arange(n), beams))
        shape = (n, beams, self.answer_length)
        return beam_search(start, log_probs, advance, shape, self.text_tokenizer.eos, float(sampling.length_penalty))


@dataclasses.dataclass(frozen=True)
class Read:
    """Prompts that the model has read.

    Attributes:
      hidden_BD: hidden state of the last position. cache: keys and values.
      log_probs: hidden states [B, D] → log-probabilities of the next token, float32 [B, V].
      advance: (tokens int32 [B], cache, number of tokens before) → (hidden states [B, D], cache). B may be a multiple
        of the number of prompts, whose rows then repeat.
    """

    hidden_BD: jax.Array
    cache: Any
    log_probs: Callable[[jax.Array], jax.Array]
    advance: Callable[[jax.Array, Any, jax.Array], tuple[jax.Array, Any]]
