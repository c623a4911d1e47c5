"""Token-by-token decoding: how the next token is drawn, which tokens are legal, and the jitted loop."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from unimm_jax import vocabulary as vocab
from unimm_jax.errors import UserError
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
    """

    guidance: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1 or self.guidance < 0:
            raise UserError(f"temperature, top_k and guidance must be at least 0, top_p in (0, 1]: {self}")


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

    def text_ids(self) -> jax.Array:
        """Which ids a text may hold, boolean [1, V]: no padding, no second beginning, no spare rows."""
        t = self.text_tokenizer
        banned = [i for i in {t.pad, t.bos} if i is not None and i != t.eos]
        banned += range(t.vocab_size, t.num_rows)
        is_text = jnp.asarray(self.vocabulary.kinds()) == vocab.TEXT
        return is_text.at[jnp.asarray(banned, jnp.int32)].set(False)[None]

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
    ) -> jax.Array:
        """Prefills the prompts (left-padded) and generates token by token: int32 [N, steps] for N keys.

        It stops when all have ended; what follows an end is filled with it.

        Args:
          images_BRHWC: uint8, the images that the prompts read; R may be 0. keep_BRP: their keep masks.
          keys_N: B = N; with guidance B = 2 N, and the second half are the prompts without condition.
          drawing: generate an image rather than text.
        """
        v, model = self.vocabulary, self.objective.module(params)
        dtype = self.objective.dtype
        guided = drawing and sampling.guidance != 1
        steps = self.image_steps if drawing else self.answer_length
        b, t = tokens_BT.shape
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
        kinds, stop = jnp.asarray(v.kinds()), v.end if drawing else self.text_tokenizer.eos
        text_only = self.text_ids()

        def next_logits(hidden_BD: jax.Array) -> jax.Array:
            logits = jnp.einsum("bd,dv->bv", hidden_BD, head, preferred_element_type=jnp.float32)
            logp = jax.nn.log_softmax(jnp.where(kinds == vocab.PADDING, NEG_INF, logits), -1)
            if guided:
                conditional, free = jnp.split(logp, 2)
                logp = free + sampling.guidance * (conditional - free)
            return logp

        def body(carry: Any) -> Any:
            hidden, cache, slots, last, position, count, done, index, found_NS = carry
            logp = next_logits(hidden)
            if drawing:
                legal = image_mask(v, last, position, count, self.max_codes, self.fixed)
            else:
                legal = text_only
            keys = jax.vmap(jax.random.fold_in, (0, None))(keys_N, index)
            token = sample_token(jnp.where(legal, logp, NEG_INF), keys, sampling)
            token = jnp.where(done, stop, token)
            done = done | (token == stop)
            position = jnp.where((token >= v.first_position), token - v.first_position, position)
            count = count + (kinds[token] == vocab.CODE)
            slots = jax.lax.dynamic_update_slice_in_dim(slots, jnp.ones((b, 1), bool), t + index, 1)
            both = jnp.concatenate([token, token]) if guided else token
            x = model.language.embed(both[:, None], dtype)
            at = positions[:, -1:] + 1 + index
            hidden, cache = extend(x, at, slots[:, None], cache, t + index)
            found_NS = jax.lax.dynamic_update_slice_in_dim(found_NS, token[:, None], index, 1)
            return hidden[:, 0], cache, slots, token, position, count, done, index + 1, found_NS

        zero = jnp.zeros(keys_N.shape, jnp.int32)
        ended_NS = jnp.full((*keys_N.shape, steps), stop, jnp.int32)
        start = (hidden[:, -1], cache, slots, zero + v.start, zero - 1, zero, zero > 0, jnp.int32(0), ended_NS)
        return jax.lax.while_loop(lambda c: (c[-2] < steps) & ~c[-3].all(), body, start)[-1]
