"""Text tokenizers with one interface: a `tokenizer.json`, a sentencepiece model, or a BPE trained on given texts."""

import base64
import functools
import hashlib
import json
import re
from collections.abc import Iterable
from typing import Any

from unimm_jax import storage
from unimm_jax.errors import DataError, UserError

PAD, BOS, EOS = "<pad>", "<s>", "</s>"


class TextTokenizer:
    """Encodes text to ids and decodes ids to text. `encode` returns a tuple of ints without special tokens.

    `encode` takes the name of a special token in a text, such as "</s>", as plain text, because captions and prompts
    are data. `encode_markup` is for the texts of a template: there the name stands for the token.

    Attributes:
      vocab_size: number of ids that the tokenizer knows.
      num_rows: number of text rows of the model, at least `vocab_size`; published models have unused rows.
      eos: end-of-text id.
      bos: beginning-of-text id, or None.
      pad: padding id.
      payload: JSON-compatible description, from which the constructor builds an equal tokenizer; saved in checkpoints.
        It has `kind` ("tokenizers" or "sentencepiece") and `model`, and optionally `rows` (`num_rows`) and `begin`
        (False: texts do not start with bos, as in LaVIT).

    Raises (constructor):
      DataError: the tokenizer has no end-of-text token.
    """

    def __init__(self, payload: dict[str, Any]):
        self.payload = payload
        if payload["kind"] == "tokenizers":
            import tokenizers

            self._fast: Any = tokenizers.Tokenizer.from_str(payload["model"])
            self._fast.encode_special_tokens = True
            self.vocab_size: int = self._fast.get_vocab_size()
            bos = self._first_id(BOS, "<|begin_of_text|>", "<bos>")
            eos = self._first_id(EOS, "<|end_of_text|>", "<|endoftext|>", "<eos>", "<|im_end|>")
            pad = self._first_id(PAD, "<|finetune_right_pad_id|>", "<unk>")
        else:
            import sentencepiece

            self._piece = sentencepiece.SentencePieceProcessor(model_proto=base64.b64decode(payload["model"]))
            self.vocab_size = self._piece.get_piece_size()
            bos, eos, pad = (
                i if i >= 0 else None for i in (self._piece.bos_id(), self._piece.eos_id(), self._piece.pad_id())
            )
        if eos is None:
            raise DataError(
                "the text tokenizer has no end-of-text token (</s>, <|end_of_text|>, <|endoftext|>); use another one"
            )
        self.num_rows: int = max(self.vocab_size, payload.get("rows", 0))
        self.bos: int | None = bos if payload.get("begin", True) else None
        self.eos: int = eos
        self.pad: int = eos if pad is None else pad
        self.encode = functools.lru_cache(maxsize=200_000)(self._encode)
        self.encode_markup = functools.lru_cache(maxsize=1000)(self._encode_markup)

    def _first_id(self, *names: str) -> int | None:
        """Id of the first of the tokens that exists."""
        return next((i for i in map(self._fast.token_to_id, names) if i is not None), None)

    def _encode(self, text: str) -> tuple[int, ...]:
        if self.payload["kind"] == "tokenizers":
            return tuple(self._fast.encode(text, add_special_tokens=False).ids)
        return tuple(self._piece.encode(text))

    def _encode_markup(self, text: str) -> tuple[int, ...]:
        if self.payload["kind"] == "tokenizers":
            return tuple(self._markup.encode(text, add_special_tokens=False).ids)
        return self._encode(text)

    @functools.cached_property
    def _markup(self) -> Any:
        return self.as_tokenizers()

    def decode(self, ids: Iterable[int]) -> str:
        """Decodes ids to stripped text. Special tokens and ids of `vocab_size` and above are skipped."""
        specials = {self.bos, self.eos, self.pad}
        kept = [int(i) for i in ids if int(i) < self.vocab_size and int(i) not in specials]
        return (self._fast if self.payload["kind"] == "tokenizers" else self._piece).decode(kept).strip()

    def as_tokenizers(self) -> Any:
        """A new `tokenizers.Tokenizer` with the same ids.

        Raises:
          UserError: a sentencepiece model of the types "word" or "char".
        """
        import tokenizers

        if self.payload["kind"] == "tokenizers":
            return tokenizers.Tokenizer.from_str(self.payload["model"])
        return _convert_sentencepiece(base64.b64decode(self.payload["model"]))

    @property
    def fingerprint(self) -> str:
        """Digest of the payload: 16 hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.payload, sort_keys=True).encode()).hexdigest()[:16]

    def __reduce__(self) -> tuple[Any, ...]:
        return (TextTokenizer, (self.payload,))


def load(path: str, **more: Any) -> TextTokenizer:
    """Loads a `tokenizer.json` or sentencepiece `.model` file, or a directory that contains one.

    Args:
      path: the file or directory.
      more: additional entries of the payload. By default the `config.json` of a directory gives `rows`.

    Raises:
      DataError: no such file, or the library cannot read it.
    """
    file = storage.path(path)
    if file.is_dir():
        found = [file / name for name in ("tokenizer.json", "tokenizer.model") if (file / name).exists()]
        if not found:
            raise DataError(f"{path} has neither tokenizer.json nor tokenizer.model; give another directory or file")
        if (file / "config.json").exists():
            try:
                published = json.loads((file / "config.json").read_text())
                more = {"rows": int(published.get("vocab_size") or 0)} | more
            except (ValueError, TypeError, AttributeError, RecursionError) as error:
                raise DataError(f"{file / 'config.json'} cannot be read: {error}") from None
        file = found[0]
    if not file.exists():
        raise DataError(f"no text tokenizer at {path}; give a tokenizer.json or a sentencepiece .model file")
    try:
        if file.suffix == ".json":
            return TextTokenizer({"kind": "tokenizers", "model": file.read_text()} | more)
        return TextTokenizer({"kind": "sentencepiece", "model": base64.b64encode(file.read_bytes()).decode()} | more)
    except Exception as error:
        raise DataError(f"{file} cannot be read as a text tokenizer: {error}") from error


def train(texts: Iterable[str], size: int) -> TextTokenizer:
    """Trains a byte-level BPE with at most `size` ids on the texts; deterministic."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return TextTokenizer({"kind": "tokenizers", "model": bpe.to_str()})


def _convert_sentencepiece(model: bytes) -> Any:
    """A `tokenizers.Tokenizer` that encodes like a sentencepiece model of the types unigram and BPE.

    Control pieces such as </s> are its special tokens. Sentencepiece takes "</s>" in a text as plain text. So does the
    tokenizer if its `encode_special_tokens` is True, except with a unigram model or with user-defined symbols.
    """
    import tokenizers
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)  # type: ignore[attr-defined]
    trainer, spec = proto.trainer_spec, proto.normalizer_spec
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    symbols = [piece.piece for piece in proto.pieces if piece.type == piece.USER_DEFINED]
    kind: Any
    if trainer.model_type == trainer.UNIGRAM:
        kind = models.Unigram(pieces, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback)
    elif trainer.model_type == trainer.BPE:
        scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == piece.NORMAL}
        ids = {piece: i for i, (piece, _) in enumerate(pieces)}
        cuts = ((piece, piece[:at], piece[at:]) for piece in scores for at in range(1, len(piece)))
        merges = [cut for cut in cuts if cut[1] in scores and cut[2] in scores]
        merges.sort(key=lambda cut: (-scores[cut[0]], ids[cut[0]]))
        kind = models.BPE(
            ids,
            [(left, right) for _, left, right in merges],
            unk_token=trainer.unk_piece,
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
            ignore_merges=bool(symbols),
        )
    else:
        raise UserError("a sentencepiece model of this type has no other format; types are unigram and BPE")
    fast = tokenizers.Tokenizer(kind)
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    fast.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    if symbols:  # never merged with what is beside them
        pattern = "|".join(re.escape(symbol) for symbol in sorted(symbols, key=len, reverse=True))
        fast.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    strip = [decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else []
    fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    control = [piece.piece for piece in proto.pieces if piece.type in (piece.CONTROL, piece.UNKNOWN)]
    fast.add_special_tokens([tokenizers.AddedToken(piece, special=True, normalized=False) for piece in control])
    return fast
