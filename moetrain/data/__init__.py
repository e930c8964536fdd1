"""Text sources, tokenisation, packing and order of training samples."""

from moetrain.data import sources
from moetrain.data.packing import PackedSequences
from moetrain.data.prepare import prepare
from moetrain.data.prepared import PreparedData
from moetrain.data.tokenizers import load_tokenizer

__all__ = ["PackedSequences", "PreparedData", "load_tokenizer", "prepare", "sources"]
