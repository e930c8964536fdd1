from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from moetrain.data import PackedSequences
from moetrain.data.prepared import TokenFile
from moetrain.errors import DataError
from moetrain.objectives.batch import IGNORE

EOS = 0


def token_file(tokens: list[int]) -> TokenFile:
    return TokenFile(Path("train.tokens"), np.array(tokens, dtype=np.uint16), np.array([0, len(tokens)]))


@pytest.mark.parametrize(("count", "samples"), [(2, 1), (4, 1), (5, 1), (6, 2), (9, 2), (10, 3)])
def test_every_token_but_the_first_is_a_target_once(count: int, samples: int) -> None:
    tokens = list(range(1, count + 1))
    sequences = PackedSequences(token_file(tokens), seq_len=4, eos_id=EOS)
    assert len(sequences) == samples
    batch = sequences.batch(np.arange(samples), np.arange(samples))
    assert batch.tokens.shape == batch.targets.shape == (samples, 4)
    assert batch.targets[batch.targets != IGNORE].tolist() == tokens[1:]
    counted = batch.targets != IGNORE
    assert (batch.targets[counted] == batch.tokens[counted] + 1).all()


def test_short_last_sample_is_padded() -> None:
    sequences = PackedSequences(token_file([5, 6, 7, 8, 9, 10]), seq_len=4, eos_id=EOS)
    batch = sequences.batch(np.array([1, 0]), np.array([70, 12]))
    assert batch.tokens.tolist() == [[9, 10, EOS, EOS], [5, 6, 7, 8]]
    assert batch.targets.tolist() == [[10, IGNORE, IGNORE, IGNORE], [6, 7, 8, 9]]
    assert batch.sample.tolist() == [70, 12]
    assert batch.tokens.dtype == batch.targets.dtype == batch.sample.dtype == torch.int64
    assert batch.document is None


def test_documents_are_numbered_by_the_end_tokens_before() -> None:
    sequences = PackedSequences(token_file([5, EOS, 7, 8, EOS, EOS, 9, 3, 1]), seq_len=8, eos_id=EOS, mask_documents=True)
    document = sequences.batch(np.array([0]), np.array([0])).document
    assert document is not None
    assert document.tolist() == [[0, 0, 1, 1, 1, 2, 3, 3]]


@pytest.mark.parametrize("tokens", [[], [5]])
def test_too_few_tokens(tokens: list[int]) -> None:
    with pytest.raises(DataError, match=rf"train\.tokens: {len(tokens)} token"):
        PackedSequences(token_file(tokens), seq_len=4, eos_id=EOS)
