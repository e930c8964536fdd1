"""Tokenizers: raw bytes, a byte-level BPE trained on the data, or a tokenizer.json from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from moetrain.errors import DataError

EOS = "<|endoftext|>"


class Tokenizer(Protocol):
    """Text to token ids and back. eos_id ends a document. definition: JSON text from which it can be rebuilt."""

    vocab_size: int
    eos_id: int
    definition: str

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class ByteTokenizer:
    """UTF-8 bytes, and one more id for the end of a document."""

    vocab_size = 257
    eos_id = 256
    definition = json.dumps({"moetrain": "bytes"})

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class JsonTokenizer:
    """A ``tokenizers`` tokenizer; its end token is the first of the usual names that it knows."""

    END_TOKENS = (EOS, "</s>", "<|end_of_text|>", "<eos>", "[SEP]")

    def __init__(self, definition: str, *, source: str) -> None:
        from tokenizers import Tokenizer as Implementation

        try:
            self._tokenizer: Any = Implementation.from_str(definition)
        except Exception as error:  # the library raises bare exceptions
            raise DataError(f"data.tokenizer: {source} is not a tokenizer.json ({error})") from error
        ids = [self._tokenizer.token_to_id(token) for token in self.END_TOKENS]
        found = [i for i in ids if i is not None]
        if not found:
            raise DataError(f"data.tokenizer: {source} has none of the end tokens {', '.join(self.END_TOKENS)}")
        self._tokenizer.no_truncation()  # a downloaded tokenizer may cut or pad to its model's length
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # the text "<|endoftext|>" in a document does not end it
        self.eos_id: int = found[0]
        self.vocab_size: int = max(self._tokenizer.get_vocab().values()) + 1  # ids may have gaps
        self.definition = definition

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)


def train_bpe(texts: Iterable[str], vocab_size: int) -> str:
    """Definition of a byte-level BPE with ``vocab_size`` tokens, end token included."""
    from tokenizers import Tokenizer as Implementation
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = Implementation(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOS], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()


def from_definition(definition: str, *, source: str) -> Tokenizer:
    """The tokenizer that a definition describes."""
    if definition == ByteTokenizer.definition:
        return ByteTokenizer()
    return JsonTokenizer(definition, source=source)


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Tokenizer of a run folder or of a tokenizer.json. Raises DataError if there is none."""
    file = Path(path).expanduser()
    file = file / "tokenizer.json" if file.is_dir() else file
    if not file.exists():
        raise DataError(f"no tokenizer at {file}")
    return from_definition(file.read_text(encoding="utf-8"), source=str(file))
