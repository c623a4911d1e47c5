"""Text tokenizers behind one class: a `tokenizer.json`, a sentencepiece model, or one trained on the captions."""

import base64
import functools
import hashlib
import json
import pathlib
import tempfile
from collections.abc import Iterable
from typing import Any

PAD, BOS, EOS = "<pad>", "<s>", "</s>"


class TextTokenizer:
    """Strings to ids and back; no special token is added to what is encoded.

    Attributes:
      words: number of ids that stand for text.
      size: number of text rows of the model, at least `words`; published models have some spare ones.
      eos: id that ends an answer. bos: id that begins a text, or None. pad: id of padding.
      payload: JSON-able description from which the constructor makes an equal tokenizer; travels in checkpoints. Beside
        kind and model it may say `rows` (the size) and `begin` False (no text begins with bos; LaVIT).
    """

    def __init__(self, payload: dict[str, Any]):
        self.payload = payload
        if payload["kind"] == "tokenizers":
            import tokenizers

            self._fast: Any = tokenizers.Tokenizer.from_str(payload["model"])
            self.words: int = self._fast.get_vocab_size()
            find = lambda *names: next((i for i in map(self._fast.token_to_id, names) if i is not None), None)
            bos = find(BOS, "<|begin_of_text|>", "<bos>")
            eos = find(EOS, "<|end_of_text|>", "<|endoftext|>", "<eos>", "<|im_end|>")
            pad = find(PAD, "<|finetune_right_pad_id|>", "<unk>")
        else:
            import sentencepiece

            self._piece = sentencepiece.SentencePieceProcessor(model_proto=base64.b64decode(payload["model"]))
            self.words = self._piece.get_piece_size()
            bos, eos, pad = (
                i if i >= 0 else None for i in (self._piece.bos_id(), self._piece.eos_id(), self._piece.pad_id())
            )
        if eos is None:
            raise ValueError("the text tokenizer has no end-of-text token (</s>, <|end_of_text|>, <|endoftext|>)")
        self.size: int = max(self.words, payload.get("rows", 0))
        self.bos: int | None = bos if payload.get("begin", True) else None
        self.eos: int = eos
        self.pad: int = eos if pad is None else pad
        self.encode = functools.lru_cache(maxsize=200_000)(self._encode)

    def _encode(self, text: str) -> tuple[int, ...]:
        if self.payload["kind"] == "tokenizers":
            return tuple(self._fast.encode(text, add_special_tokens=False).ids)
        return tuple(self._piece.encode(text))

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text, special tokens and ids that are not text left out."""
        specials = {self.bos, self.eos, self.pad}
        kept = [int(i) for i in ids if int(i) < self.words and int(i) not in specials]
        return (self._fast if self.payload["kind"] == "tokenizers" else self._piece).decode(kept).strip()

    def as_tokenizers(self) -> Any:
        """A fresh `tokenizers.Tokenizer` with the same ids.

        Raises:
          ValueError: a sentencepiece model where transformers, which converts it, is not installed.
        """
        import tokenizers

        if self.payload["kind"] == "tokenizers":
            return tokenizers.Tokenizer.from_str(self.payload["model"])
        try:
            from transformers import LlamaTokenizer
        except ImportError:
            raise ValueError(
                "converting a sentencepiece tokenizer needs transformers (pip install transformers)"
            ) from None
        with tempfile.TemporaryDirectory() as scratch:
            file = pathlib.Path(scratch) / "tokenizer.model"
            file.write_bytes(base64.b64decode(self.payload["model"]))
            return LlamaTokenizer.from_pretrained(scratch).backend_tokenizer

    @property
    def fingerprint(self) -> str:
        """Short digest of the tokenizer's content."""
        return hashlib.sha256(json.dumps(self.payload, sort_keys=True).encode()).hexdigest()[:16]

    def __reduce__(self):
        return (TextTokenizer, (self.payload,))


def load(path: str, **more: Any) -> TextTokenizer:
    """Opens a `tokenizer.json` or a sentencepiece `.model` file, or a folder that holds one.

    Args:
      more: further entries of the payload. A folder's `config.json` gives `rows`, if they do not.

    Raises:
      ValueError: no such file, or one that the library cannot read.
    """
    file = pathlib.Path(path)
    if file.is_dir():
        found = [file / name for name in ("tokenizer.json", "tokenizer.model") if (file / name).exists()]
        if not found:
            raise ValueError(f"{path} holds neither tokenizer.json nor tokenizer.model")
        if (file / "config.json").exists():
            more = {"rows": json.loads((file / "config.json").read_text()).get("vocab_size", 0)} | more
        file = found[0]
    if not file.exists():
        raise ValueError(f"no text tokenizer at {path}; give a tokenizer.json or a sentencepiece .model file")
    try:
        if file.suffix == ".json":
            return TextTokenizer({"kind": "tokenizers", "model": file.read_text()} | more)
        return TextTokenizer({"kind": "sentencepiece", "model": base64.b64encode(file.read_bytes()).decode()} | more)
    except Exception as error:
        raise ValueError(f"{file} cannot be read as a text tokenizer: {error}") from error


def train(texts: Iterable[str], size: int) -> TextTokenizer:
    """Trains a byte-level BPE of at most `size` ids on the given texts (deterministic)."""
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
