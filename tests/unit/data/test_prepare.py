from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xxhash

from moetrain.data import load_tokenizer, prepare
from moetrain.data.prepare import plan_split
from moetrain.data.prepared import PreparedData, TokenFile
from moetrain.data.sources import DataConfig, TextConfig
from moetrain.errors import DataError, StorageError


def write_lines(folder: Path, count: int) -> Path:
    path = folder / "lines.txt"
    path.write_text("".join(f"line number {i} of the file\n" for i in range(count)))
    return path


def by_line(folder: Path, count: int = 200, *, tokenizer: str = "bytes", eval_fraction: float = 0.1, vocab_size: int = 300) -> DataConfig:
    path = write_lines(folder, count)
    return TextConfig(path=str(path), split="line", tokenizer=tokenizer, eval_fraction=eval_fraction, vocab_size=vocab_size)


def texts(data: PreparedData, file: TokenFile) -> list[str]:
    pieces = [file.tokens[a:b] for a, b in zip(file.document_offsets[:-1], file.document_offsets[1:], strict=True)]
    assert all(piece[-1] == data.eos_id and data.eos_id not in piece[:-1] for piece in pieces)
    return [data.tokenizer.decode(piece.tolist()) for piece in pieces]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_every_document_is_kept_once_in_order(tmp_path: Path, tokenizer: str) -> None:
    data = prepare(by_line(tmp_path, tokenizer=tokenizer))
    train, held_out = texts(data, data.train), texts(data, data.evaluation)
    expected = (tmp_path / "lines.txt").read_text().splitlines()
    assert sorted(train + held_out) == sorted(expected)
    assert train == [text for text in expected if text in set(train)]
    assert 8 <= len(held_out) <= 35
    assert data.train.tokens.dtype == np.uint16
    assert isinstance(data.train.tokens, np.memmap)
    assert data.vocab_size == data.tokenizer.vocab_size > max(data.train.tokens)


def test_adding_documents_does_not_move_the_others(tmp_path: Path) -> None:
    few = prepare(by_line(tmp_path, 200))
    held_out = set(texts(few, few.evaluation))
    many = prepare(by_line(tmp_path, 400))
    assert {text for text in texts(many, many.evaluation) if int(text.split()[2]) < 200} == held_out


def test_one_document_holds_out_its_tail(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("abcdefghij" * 10)
    data = prepare(TextConfig(path=str(tmp_path / "one.txt"), tokenizer="bytes", eval_fraction=0.2))
    assert bytes(data.train.tokens.tolist()) == b"abcdefghij" * 8 + b"a"
    assert bytes(data.evaluation.tokens[:-1].tolist()) == b"bcdefghij" + b"abcdefghij"
    assert data.evaluation.tokens[-1] == data.eos_id
    assert data.train.document_offsets.tolist() == [0, 81]
    assert data.evaluation.document_offsets.tolist() == [0, 20]


@pytest.mark.parametrize(
    ("fraction", "train", "held_out"),
    [(0.35, [0, 4, 8, 12, 16, 20, 24, 26], [0, 2, 6, 10, 14]), (0.4, [0, 4, 8, 12, 16, 20, 24], [0, 4, 8, 12, 16])],
)
def test_tail_may_hold_several_documents(tmp_path: Path, fraction: float, train: list[int], held_out: list[int]) -> None:
    (tmp_path / "same.txt").write_text("abc\n" * 10)  # equal documents have equal hashes: none can be told apart
    data = prepare(TextConfig(path=str(tmp_path / "same.txt"), split="line", tokenizer="bytes", eval_fraction=fraction))
    assert data.train.document_offsets.tolist() == train
    assert data.evaluation.document_offsets.tolist() == held_out
    assert (data.train.tokens.size, data.evaluation.tokens.size) == (train[-1], held_out[-1])


def test_data_too_short_to_split(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("ab")
    data = prepare(TextConfig(path=str(tmp_path / "one.txt"), tokenizer="bytes"))
    assert (data.train.tokens.size, data.evaluation.tokens.size) == (3, 0)


@pytest.mark.parametrize("count", [1, 2, 3, 50])
@pytest.mark.parametrize("fraction", [0.0, 0.02, 0.5, 0.999999])
def test_split_never_holds_out_all(count: int, fraction: float) -> None:
    documents = [f"document {i}" for i in range(count)]
    split = plan_split(iter(documents), fraction)
    held_out = sum(map(split.holds_out, documents))
    assert split.num_documents == count
    assert held_out < count
    assert (held_out > 0) != (split.tail > 0) or fraction == 0.0
    assert fraction > 0 or (held_out == 0 and split.tail == 0)


def test_second_call_finds_the_first(tmp_path: Path, cache: Path) -> None:
    stages: list[str] = []
    config = by_line(tmp_path, tokenizer="bpe")
    first = prepare(config)
    config.seq_len, config.mask_documents = 17, True
    assert prepare(config, progress=lambda stage, done, total: stages.append(stage)).content_hash == first.content_hash
    assert set(stages) == {"reading"}
    moved = (tmp_path / "lines.txt").rename(tmp_path / "moved.txt")
    config.path = str(moved)  # type: ignore[attr-defined]
    assert prepare(config).folder == first.folder == cache / "data" / first.content_hash
    assert len(list((cache / "tokenizers").glob("*/tokenizer.json"))) == 1
    assert not list((cache / "data").glob(".*"))


def test_what_changes_the_tokens_changes_the_key(tmp_path: Path) -> None:
    foreign = tmp_path / "tokenizer.json"
    prepare(by_line(tmp_path, tokenizer="bpe")).save_tokenizer(tmp_path)
    configs = [by_line(tmp_path), by_line(tmp_path, tokenizer="bpe"), by_line(tmp_path, tokenizer="bpe", vocab_size=320)]
    configs += [by_line(tmp_path, eval_fraction=0.2), by_line(tmp_path, tokenizer=str(foreign))]
    keys = [prepare(config).content_hash for config in configs]
    keys.append(prepare(by_line(tmp_path, 201)).content_hash)
    assert len(set(keys)) == len(keys)
    ignored = prepare(by_line(tmp_path, vocab_size=999)), prepare(by_line(tmp_path))
    assert ignored[0].content_hash == ignored[1].content_hash


def test_tokenizer_from_a_file(tmp_path: Path) -> None:
    trained = prepare(by_line(tmp_path, tokenizer="bpe"))
    trained.save_tokenizer(tmp_path)
    again = prepare(by_line(tmp_path, tokenizer=str(tmp_path / "tokenizer.json")))
    assert (again.train.tokens == trained.train.tokens).all()


def test_large_vocabulary_takes_four_bytes(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"</s>": 0, "line": 70_000, "[UNK]": 1}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "words.json"))
    data = prepare(by_line(tmp_path, tokenizer=str(tmp_path / "words.json")))
    assert data.vocab_size == 70_001
    assert data.train.tokens.dtype == np.uint32
    assert data.train.tokens[0] == 70_000


def test_max_documents(tmp_path: Path) -> None:
    config = by_line(tmp_path, eval_fraction=0.0)
    config.max_documents = 7
    data = prepare(config)
    assert texts(data, data.train) == [f"line number {i} of the file" for i in range(7)]
    assert data.evaluation.tokens.size == 0


@pytest.mark.parametrize("content", ["", " \n\n\t\n"])
def test_empty_data(tmp_path: Path, content: str) -> None:
    (tmp_path / "empty.txt").write_text(content)
    with pytest.raises(DataError, match=r"no text in 1 file.*empty\.txt"):
        prepare(TextConfig(path=str(tmp_path), tokenizer="bytes"))


@pytest.mark.parametrize("name", ["train.tokens", "evaluation.documents", "meta.json"])
def test_damaged_cache_entry_is_noticed(tmp_path: Path, name: str) -> None:
    config = by_line(tmp_path)
    file = prepare(config).folder / name
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(DataError, match=rf"{name}.*delete .* to prepare the data again"):
        prepare(config)


def test_files_that_change_meanwhile_are_not_cached(tmp_path: Path, cache: Path) -> None:
    config = by_line(tmp_path)

    def change(stage: str, done: int, total: int | None) -> None:
        if stage == "tokenising":
            (tmp_path / "lines.txt").write_text("something else\n")

    with pytest.raises(DataError, match="changed while they were being prepared"):
        prepare(config, progress=change)
    assert list((cache / "data").iterdir()) == []


def test_saved_tokenizer_is_whole(tmp_path: Path) -> None:
    data = prepare(by_line(tmp_path, tokenizer="bpe"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".tokenizer.json.tmp").write_text("left by a killed run")
    data.save_tokenizer(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["tokenizer.json"]
    saved = (tmp_path / "run" / "tokenizer.json").read_bytes()
    assert xxhash.xxh3_64_hexdigest(saved) == data.meta["tokenizer_xxh3_64"]
    assert load_tokenizer(tmp_path / "run").encode("line number") == data.tokenizer.encode("line number")


def test_full_disk_leaves_nothing_behind(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    config = by_line(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(StorageError, match=r"cannot write .*No space left on device"):
            prepare(config)
    assert list((cache / "data").iterdir()) == []
    assert prepare(config).train.tokens.size > 0


def test_cache_that_is_a_file(tmp_path: Path, cache: Path) -> None:
    cache.write_text("in the way")
    with pytest.raises(StorageError, match="MOETRAIN_CACHE"):
        prepare(by_line(tmp_path))


def test_leftovers_of_a_killed_process_are_replaced(tmp_path: Path, cache: Path) -> None:
    config = by_line(tmp_path)
    key = prepare(config).content_hash
    (cache / "data" / key).rename(cache / "data" / f".{key}.partial")
    assert prepare(config).folder.name == key
    assert [path.name for path in (cache / "data").iterdir()] == [key]


def test_progress_is_reported(tmp_path: Path) -> None:
    calls: list[tuple[str, int, int | None]] = []
    prepare(by_line(tmp_path, 300, tokenizer="bpe"), progress=lambda *call: calls.append(call))
    assert list(dict.fromkeys(stage for stage, _, _ in calls)) == ["reading", "splitting", "training the tokenizer", "tokenising"]
    assert calls[-1] == ("tokenising", 300, 300)


def test_two_processes_at_once(tmp_path: Path, cache: Path) -> None:
    write_lines(tmp_path, 2000)
    program = (
        "import sys\nfrom moetrain.data import prepare\nfrom moetrain.data.sources import TextConfig\nstages = []\n"
        "data = prepare(TextConfig(path=sys.argv[1], split='line', vocab_size=300), progress=lambda *call: stages.append(call[0]))\n"
        "print(data.content_hash, data.train.tokens.size, 'tokenising' in stages)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "lines.txt")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    results = [process.communicate(timeout=120)[0].split() for process in processes]
    assert results[0][:2] == results[1][:2]
    assert sorted(result[2] for result in results) == ["False", "True"]
    assert len(list((cache / "data").iterdir())) == 1


def test_import_needs_neither_datasets_nor_tokenizers() -> None:
    program = (
        "import sys\nsys.modules['datasets'] = sys.modules['tokenizers'] = sys.modules['pyarrow'] = None\n"
        "import moetrain.data\nfrom moetrain import registry\nprint(*registry.components('data'))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.split()[:2] == ["stdlib", "text"]
