from __future__ import annotations

from pathlib import Path

import pytest

from moetrain.data import load_tokenizer
from moetrain.data.tokenizers import EOS, ByteTokenizer, JsonTokenizer, from_definition, train_bpe
from moetrain.errors import DataError

TEXTS = ["def f(x):\n    return x\n", "naïve café, 日本語 \U0001f600\r\n\ttabs  and   spaces ", "", "\x00\x07", EOS]


@pytest.fixture(scope="module")
def bpe() -> str:
    return train_bpe(["def f(x):\n    return x\n", "def g(y):\n    return y\n"] * 10, 300)


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_encoding(bpe: str, text: str) -> None:
    for tokenizer in (ByteTokenizer(), from_definition(bpe, source="test")):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode_batch([text, "x"])[0] == ids
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        assert tokenizer.eos_id not in ids  # not even where the text spells it


def test_end_tokens_are_not_shown(bpe: str) -> None:
    for tokenizer in (ByteTokenizer(), from_definition(bpe, source="test")):
        assert tokenizer.decode([*tokenizer.encode("ab"), tokenizer.eos_id]) == "ab"


def test_training_is_repeatable(bpe: str) -> None:
    again = train_bpe(["def f(x):\n    return x\n", "def g(y):\n    return y\n"] * 10, 300)
    assert again == bpe
    tokenizer = from_definition(bpe, source="test")
    assert tokenizer.vocab_size <= 300
    assert len(tokenizer.encode("return")) < 4  # it has learnt to join bytes


def test_cutting_and_padding_of_a_foreign_tokenizer_are_off(bpe: str) -> None:
    from tokenizers import Tokenizer

    foreign = Tokenizer.from_str(bpe)
    foreign.enable_truncation(3)
    foreign.enable_padding(length=50)
    assert JsonTokenizer(foreign.to_str(), source="test").encode_batch(["abc xyz 123"]) == [
        Tokenizer.from_str(bpe).encode("abc xyz 123").ids
    ]


def test_load_tokenizer(bpe: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(bpe, encoding="utf-8")
    assert load_tokenizer(tmp_path).encode("def") == load_tokenizer(tmp_path / "tokenizer.json").encode("def")
    (tmp_path / "tokenizer.json").write_text(ByteTokenizer.definition, encoding="utf-8")
    assert load_tokenizer(tmp_path).encode("a") == [97]


def test_bad_tokenizers_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"missing.tokenizer\.json"):
        load_tokenizer(tmp_path / "missing" / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match=r"tokenizer\.json is not a tokenizer"):
        load_tokenizer(tmp_path)
    from tokenizers import Tokenizer, models

    (tmp_path / "tokenizer.json").write_text(Tokenizer(models.BPE()).to_str(), encoding="utf-8")
    with pytest.raises(DataError, match="none of the end tokens"):
        load_tokenizer(tmp_path)
