"""What `data.path` can name, and what is said when it cannot be read."""

from __future__ import annotations

import logging
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from sparsek_dist.config import DataConfig
from sparsek_dist.data import readers
from sparsek_dist.data.sources import load_documents, locate, source_identity
from sparsek_dist.errors import ConfigError, DataError
from tests.data.toys import config_for, write_jsonl


def texts_of(path: Path, **changes: str) -> list[str]:
    documents = load_documents(config_for(path, **changes))
    assert documents.column_names == ["text"]
    return list(documents["text"])


def test_text_files_keep_every_character(tmp_path: Path) -> None:
    (tmp_path / "corpus" / "deep").mkdir(parents=True)
    (tmp_path / "corpus" / "deep" / "b.txt").write_bytes("h\u00e9\r\n\0 x\r".encode())
    (tmp_path / "corpus" / "a.txt").write_bytes(b"\xef\xbb\xbffirst\n")
    (tmp_path / "corpus" / ".hidden.txt").write_bytes(b"not me")
    (tmp_path / "corpus" / ".cache").mkdir()
    (tmp_path / "corpus" / ".cache" / "c.txt").write_bytes(b"nor me")
    expected = ["first\n", "h\u00e9\r\n\0 x\r"]
    assert texts_of(tmp_path / "corpus", cache=str(tmp_path / "cache")) == expected
    assert texts_of(tmp_path / "corpus" / "**" / "*.txt", cache=str(tmp_path / "cache")) == expected


def test_json_lines_array_and_parquet_agree(tmp_path: Path) -> None:
    # Dates and digits: readers that guess types would turn them into something else.
    texts = ["2024-01-01", "17", "a\nb", "\u6f22"]
    write_jsonl(tmp_path / "a.jsonl", texts, column="body")
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    (tmp_path / "b.json").write_text("[" + ",\n".join(lines) + "]")
    (tmp_path / "c.jsonl").write_text("\ufeff" + "\n\n".join(lines))
    parquet.write_table(pa.table({"n": [1, 2, 3, 4], "body": texts}), tmp_path / "d.parquet")
    for name in ("a.jsonl", "b.json", "c.jsonl", "d.parquet"):
        assert texts_of(tmp_path / name, column="body") == texts, name


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["old"])
    before = source_identity(config_for(path))
    assert texts_of(path) == ["old"]
    write_jsonl(path, ["newer"])
    assert texts_of(path) == ["newer"]
    assert source_identity(config_for(path)) != before


def test_empty_documents_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["", "a", " \n\t", "b"])
    with caplog.at_level(logging.WARNING):
        assert texts_of(path) == ["a", "b"]
    assert "2 of 4 documents are empty" in caplog.text


def test_standard_library_holds_modules_and_no_tests() -> None:
    files = locate("python-stdlib").files
    assert list(files) == sorted(files)
    assert len(files) > 300
    assert any(file.endswith("/dataclasses.py") for file in files)
    assert not any(part in file for file in files for part in ("/test/", "/site-packages/", "/idle_test/"))


def test_modules_that_are_not_utf8_are_skipped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "good.py").write_text("x = 1\n")
    (tmp_path / "bad.py").write_bytes(b"# \xe9\n")
    files = [(str(tmp_path / name), 0, 0) for name in ("bad.py", "good.py")]
    with caplog.at_level(logging.WARNING):
        assert list(readers.source_rows(files)) == [{"text": "x = 1\n"}]
    assert "1 modules" in caplog.text
    assert "bad.py" in caplog.text


@pytest.mark.parametrize(
    ("name", "raw", "error", "said"),
    [
        ("a.txt", b"ok\nh\xe9 there", DataError, ["data.path", "a.txt", "0xe9", "offset 4"]),
        ("a.txt", b"", DataError, ["data.path", "a.txt", "all of its 1 documents are empty"]),
        ("a.txt", b" \n ", DataError, ["data.path", "a.txt", "empty"]),
        ("a.jsonl", b"", DataError, ["data.path", "a.jsonl", "no document"]),
        ("a.json", b"[]", DataError, ["data.path", "a.json", "no document"]),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', DataError, ["a.jsonl, line 2", "not JSON"]),
        ("a.jsonl", b'{"text": "a"}\n{"text": 5}\n', DataError, ["a.jsonl, line 2", "data.column", "of type int"]),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": null}', DataError, ["a.jsonl, line 3", "data.column", "null"]),
        ("a.jsonl", b'{"text": "a"}\n{"body": "b"}', DataError, ["a.jsonl, line 2", "data.column", "missing"]),
        ("a.json", b'[{"text": "a"}, {"text": 1.5}]', DataError, ["a.json, row 2", "data.column", "of type float"]),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}', DataError, ["data.path", "a.jsonl", "0xe9", "offset 24"]),
        ("a.jsonl", b'{"text": "x\\ud800"}', DataError, ["a.jsonl, line 1", "surrogate", "character 1"]),
        ("a.jsonl", b"7\n", DataError, ["a.jsonl, line 1", "int, not an object"]),
        ("a.jsonl", b'{"body": "a", "id": 3}', ConfigError, ["data.column = 'text'", "body, id"]),
        ("a.parquet", b"not parquet", DataError, ["data.path", "a.parquet"]),
        ("a.csv", b"text\na\n", ConfigError, ["data.path", "a.csv", ".parquet"]),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, raw: bytes, error: type[Exception], said: list[str]) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(error) as caught:
        load_documents(config_for(tmp_path / name))
    assert type(caught.value) is error
    for part in said:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "error", "said"),
    [
        ({"text": ["a", None]}, DataError, ["row 1", "data.column", "null"]),
        ({"text": [1, 2]}, DataError, ["row 0", "data.column", "int64"]),
        ({"body": ["a"], "id": [1]}, ConfigError, ["data.column = 'text'", "body, id"]),
    ],
)
@pytest.mark.parametrize("kind", ["parquet", "hub"])
def test_bad_columns_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, columns: dict, error: type[Exception], said: list[str]
) -> None:
    data = config_for(tmp_path / "a.parquet")
    if kind == "parquet":
        parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    else:
        data = DataConfig(path="owner/name")
        monkeypatch.setattr(datasets, "load_dataset", lambda path, split: datasets.Dataset.from_dict(columns))
    with pytest.raises(error) as caught:
        load_documents(data)
    for part in said:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "path", ["./corpus", "/no/such/corpus", "a/b/c", "corpus.txt", "~/no-such", "~nobody-such/x", "no-such-*"]
)
def test_missing_files_are_not_looked_up_on_the_hub(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(ConfigError, match=r"data\.path") as caught:
        load_documents(DataConfig(path=path))
    assert repr(path) in str(caught.value)


def test_folder_without_text_and_mixed_folder(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(DataError, match=r"data\.path .* holds no file"):
        load_documents(config_for(tmp_path))
    (tmp_path / "a.txt").write_text("x")
    write_jsonl(tmp_path / "b.jsonl", ["x"])
    with pytest.raises(ConfigError, match=r"data\.path .* mixes json and text"):
        load_documents(config_for(tmp_path))


def test_unreachable_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, split: str) -> None:
        raise ConnectionError(f"Couldn't reach {path!r} on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=r"data\.path = 'owner/name'.*HF_HUB_OFFLINE.*Couldn't reach"):
        load_documents(DataConfig(path="owner/name"))


@pytest.mark.parametrize("path", ["python-stdlib", "plain.txt"])
def test_a_column_that_plain_text_does_not_have_is_refused(tmp_path, path):
    (tmp_path / "plain.txt").write_text("some text")
    source = path if path == "python-stdlib" else str(tmp_path / path)
    with pytest.raises(ConfigError, match=r"data\.column"):
        load_documents(DataConfig(path=source, column="body", cache=str(tmp_path / "cache")))
