from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from moetrain import registry
from moetrain.config import dump, load
from moetrain.data import prepare
from moetrain.data.sources import ArrowConfig, DataConfig, JsonConfig, ParquetConfig, StdlibConfig, TextConfig, check_text, read_text
from moetrain.errors import ConfigError, DataError


def documents(config: DataConfig) -> list[str]:
    return [text for file in config.files() for text in config.documents(file)]


def test_registered_kinds_load_from_plain_dictionaries() -> None:
    assert set(registry.components("data")) >= {"stdlib", "text", "json", "parquet", "arrow"}
    config = TextConfig(path="x", split="line", seq_len=8)
    assert load(TextConfig, dump(config)) == config
    assert set(dump(ParquetConfig(path="x"))) - set(dump(StdlibConfig())) == {"path", "column", "streaming"}


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("seq_len", 0),
        ("eval_fraction", 1.0),
        ("eval_fraction", -0.1),
        ("vocab_size", 100),
        ("max_documents", 0),
    ],
)
def test_bad_settings_name_the_field(setting: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"data\.{setting} = "):
        load(StdlibConfig, {setting: value}, path="data")


def test_a_missing_tokenizer_is_refused_when_the_data_is_prepared() -> None:
    with pytest.raises(ConfigError, match=r"data\.tokenizer = 'missing.json'"):
        prepare(StdlibConfig(tokenizer="missing.json"))


def test_located_sources_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = TextConfig(path="corpus/*.txt", tokenizer="tok.json").located()
    assert (config.path, config.tokenizer) == (str(tmp_path / "corpus/*.txt"), str(tmp_path / "tok.json"))
    assert StdlibConfig().located() == StdlibConfig() and config.located() == config


def test_stdlib_files_are_sources_without_tests() -> None:
    files = StdlibConfig().files()
    assert files == sorted(files)
    names = {file.name for file in files}
    assert {"argparse.py", "functools.py"} <= names
    assert not [f for f in files if {"test", "tests", "idle_test", "site-packages", "lib2to3"} & set(f.parts[-4:-1])]


def test_stdlib_leaves_out_other_encodings(tmp_path: Path) -> None:
    (tmp_path / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\n# caf\xe9\n")
    assert list(StdlibConfig().documents(tmp_path / "latin.py")) == []


def test_text_file_glob_folder_and_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {"b.txt": "two", "a.txt": "one", "sub/c.txt": "three", "d.bin": "no"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert documents(TextConfig(path="a.txt")) == ["one"]
    assert documents(TextConfig(path="*.txt")) == ["one", "two"]
    assert documents(TextConfig(path="~/sub")) == ["three"]
    assert documents(TextConfig(path=str(tmp_path))) == ["one", "two", "three"]


@pytest.mark.parametrize(("split", "expected"), [("file", 1), ("paragraph", 3), ("line", 8)])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_text_splits(tmp_path: Path, split: Any, expected: int, newline: str) -> None:
    (tmp_path / "a.txt").write_bytes("one\ntwo\n\nthree\n  \nfour\nfive\n".replace("\n", newline).encode())
    found = documents(TextConfig(path=str(tmp_path / "a.txt"), split=split))
    assert len(found) == expected
    assert split != "line" or "\r" not in "".join(found)


def test_not_utf8_names_file_and_byte(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"0123456\xff89")
    with pytest.raises(DataError, match=r"bad\.txt: the byte at offset 7 is not UTF-8"):
        documents(TextConfig(path=str(tmp_path)))
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "ok"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl: the byte at offset 28 is not UTF-8"):
        documents(JsonConfig(path=str(tmp_path)))


@pytest.mark.parametrize("chunk_bytes", [1, 2, 3, 5, 1000])
def test_characters_may_lie_across_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int) -> None:
    monkeypatch.setattr("moetrain.data.cache.CHUNK_BYTES", chunk_bytes)
    good, cut, bad = (tmp_path / name for name in ("good", "cut", "bad"))
    text = "aé日\U0001f600\r\nb"
    good.write_bytes(text.encode())
    check_text(good)
    assert read_text(good) == text
    cut.write_bytes("é日".encode()[:-1])
    bad.write_bytes("é日\U0001f600".encode() + b"\xf0\x9fa")
    for file, offset in ((cut, 2), (bad, 9)):
        for read in (check_text, read_text):
            with pytest.raises(DataError, match=rf"{file.name}: the byte at offset {offset} is not UTF-8"):
                read(file)


def test_no_path_is_not_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("not asked for")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"data\.path = '': no such file"):
        documents(TextConfig(path=""))


@pytest.mark.parametrize("path", ["nothing.txt", "no*.txt", "."])
def test_missing_path(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"data\.path = "):
        documents(TextConfig(path=path))


ROWS = [{"text": "one", "n": 1}, {"text": "zwei ü", "n": 2}, {"text": "three", "n": 3}]


def write_tables(folder: Path) -> dict[str, type[Any]]:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(ROWS)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "list.json").write_text(json.dumps(ROWS))
    pyarrow.parquet.write_table(table, folder / "rows[1].parquet")
    with pyarrow.OSFile(str(folder / "rows.arrow"), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    return {"rows.jsonl": JsonConfig, "list.json": JsonConfig, "rows[1].parquet": ParquetConfig, "rows.arrow": ArrowConfig}


@pytest.mark.parametrize("streaming", [False, True])
def test_tables(tmp_path: Path, cache: Path, streaming: bool, capfd: pytest.CaptureFixture[str]) -> None:
    for name, kind in write_tables(tmp_path).items():
        assert documents(kind(path=str(tmp_path / name), streaming=streaming)) == [row["text"] for row in ROWS]
        with pytest.raises(DataError, match=r"has no column data\.column = 'body'; it has text, n"):
            documents(kind(path=str(tmp_path / name), column="body", streaming=streaming))
        with pytest.raises(DataError, match=r"row 0, column 'n' holds int, not text"):
            documents(kind(path=str(tmp_path / name), column="n", streaming=streaming))
    assert {p.name for p in tmp_path.iterdir()} <= {"cache", "rows.jsonl", "list.json", "rows[1].parquet", "rows.arrow"}
    assert "%" not in capfd.readouterr().err  # no progress bars


@pytest.mark.parametrize("streaming", [False, True])
def test_new_content_is_read_though_the_time_of_the_file_is_the_old(tmp_path: Path, streaming: bool) -> None:
    config = JsonConfig(path=str(tmp_path / "rows.jsonl"), streaming=streaming)
    for text in ("old", "new"):
        Path(config.path).write_text(json.dumps({"text": text}) + "\n")
        os.utime(config.path, (1e9, 1e9))
        assert documents(config) == [text]


DAMAGED = [
    (ParquetConfig, "x.parquet", b"junk"),
    (JsonConfig, "x.json", b"{x"),
    (JsonConfig, "x.jsonl", b""),
    (ArrowConfig, "x.arrow", b"junk"),
]


@pytest.mark.parametrize(("kind", "name", "content"), DAMAGED)
@pytest.mark.parametrize("streaming", [False, True])
def test_damaged_tables_name_the_file(
    tmp_path: Path, kind: type[Any], name: str, content: bytes, streaming: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}: "):
        documents(kind(path=str(tmp_path), streaming=streaming))
    assert capfd.readouterr().err == ""  # the library does not report the same error again
