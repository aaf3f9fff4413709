"""Token stores: exact, split by document, built once, and never taken for whole when they are not."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from sparsek_dist.config import DataConfig
from sparsek_dist.data import corpus as corpus_module
from sparsek_dist.data import store as store_module
from sparsek_dist.data.corpus import Corpus, prepare
from sparsek_dist.data.sources import load_documents
from sparsek_dist.data.store import TokenStore
from sparsek_dist.errors import ConfigError, DataError
from tests.data.toys import EOS, ToyTokenizer, config_for, decode, write_jsonl

TEXTS = [f"document {i} \u00e9\u6f22 <|end|>" + "x" * (i % 7) for i in range(40)]


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    return config_for(write_jsonl(tmp_path / "a.jsonl", TEXTS), held_out=0.1)


@pytest.fixture
def tokenizer() -> ToyTokenizer:
    tokenizer = ToyTokenizer()
    tokenizer.backend_tokenizer._backend.encode_special_tokens = True
    return tokenizer


def documents_of(store: TokenStore) -> list[str]:
    spans = zip(store.offsets[:-1].tolist(), store.offsets[1:].tolist(), strict=True)
    return [decode(store.tokens[begin:end].tolist()) for begin, end in spans]


def folder_of(data: DataConfig) -> Path:
    (index,) = Path(data.cache).glob("*/index.json")
    return index.parent


def test_every_document_is_in_one_split_and_exact(data: DataConfig, tokenizer: ToyTokenizer) -> None:
    corpus = prepare(data, tokenizer, seed=0)
    train, held_out = documents_of(corpus.train), documents_of(corpus.held_out)
    assert len(held_out) == 4
    assert sorted(train + held_out) == sorted(TEXTS)
    assert train != sorted(train), "documents must be shuffled"
    for store, texts in ((corpus.train, train), (corpus.held_out, held_out)):
        assert store.tokens.dtype == np.uint16
        assert store.offsets.dtype == np.int64
        assert store.num_bytes == sum(len(text.encode()) for text in texts)
        assert store.num_tokens == len(store.tokens) == store.num_bytes + 2 * store.num_documents
        assert store.eos_id == EOS


def test_seed_decides_the_split_and_nothing_else_does(data: DataConfig, tokenizer: ToyTokenizer) -> None:
    first = prepare(data, tokenizer, seed=0)
    other = prepare(data, tokenizer, seed=1)
    longer = DataConfig(path=data.path, cache=data.cache, held_out=data.held_out, sequence_length=9999)
    calls = tokenizer.calls
    assert prepare(longer, tokenizer, seed=0).train.fingerprint == first.train.fingerprint
    roundabout = Path(data.path).parent / "cache" / ".." / Path(data.path).name
    same = DataConfig(path=str(roundabout), cache=data.cache, held_out=data.held_out)
    assert prepare(same, tokenizer, seed=0).train.fingerprint == first.train.fingerprint
    assert tokenizer.calls == calls, "neither sequence_length nor the spelling of a path may enter the cache's name"
    assert documents_of(other.held_out) != documents_of(first.held_out)
    elsewhere = DataConfig(path=data.path, cache=data.cache + "2", held_out=data.held_out)
    assert prepare(elsewhere, tokenizer, seed=0).train.fingerprint == first.train.fingerprint


def test_second_time_comes_from_the_cache(data: DataConfig, tokenizer: ToyTokenizer) -> None:
    first = prepare(data, tokenizer, seed=0)
    assert tokenizer.calls > 0
    calls = tokenizer.calls
    second = prepare(data, tokenizer, seed=0)
    assert tokenizer.calls == calls
    assert documents_of(second.train) == documents_of(first.train)
    # Padding that somebody left switched on changes nothing, and is switched off where it would.
    tokenizer.backend_tokenizer.enable_padding(length=99)
    tokenizer.backend_tokenizer.enable_truncation(3)
    prepare(data, tokenizer, seed=0)
    assert tokenizer.calls == calls
    again = prepare(data, tokenizer, seed=2)
    assert sorted(documents_of(again.train) + documents_of(again.held_out)) == sorted(TEXTS)


def test_whatever_the_tokens_depend_on_builds_them_anew(data: DataConfig, tokenizer: ToyTokenizer) -> None:
    prepare(data, tokenizer, seed=0)
    for changed in (
        DataConfig(path=data.path, cache=data.cache, held_out=0.2),
        DataConfig(path=str(write_jsonl(Path(data.path), [*TEXTS, "one more"])), cache=data.cache, held_out=0.1),
    ):
        calls = tokenizer.calls
        prepare(changed, tokenizer, seed=0)
        assert tokenizer.calls > calls
    # Same vocabulary, but `<|end|>` in a text is now one token.
    tokenizer.backend_tokenizer._backend.encode_special_tokens = False
    calls = tokenizer.calls
    assert prepare(changed, tokenizer, seed=0).train.num_tokens > 0
    assert tokenizer.calls > calls


def test_a_large_vocabulary_takes_four_bytes(data: DataConfig) -> None:
    assert prepare(data, ToyTokenizer(vocab_size=1 << 16), seed=0).train.tokens.dtype == np.uint16
    large = prepare(data, ToyTokenizer(vocab_size=(1 << 16) + 1), seed=0).train
    assert large.tokens.dtype == np.int32
    assert int(large.tokens.max()) == EOS


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 2)


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def miscount(path: Path) -> None:
    index = json.loads(path.read_text())
    index["splits"]["train"]["num_bytes"] += 1
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("file", "damage", "said"),
    [
        ("train.tokens", cut, "train.tokens has"),
        ("train.tokens", flip, "train.tokens does not match"),
        ("held_out.tokens", flip, "held_out.tokens does not match"),
        ("train.offsets", flip, "train.offsets does not match"),
        ("held_out.offsets", Path.unlink, "held_out.offsets is missing"),
        ("index.json", cut, "index.json cannot be read"),
        ("index.json", Path.unlink, "index.json is missing"),
        ("index.json", miscount, "entry of train in index.json was altered"),
    ],
)
def test_a_damaged_cache_is_built_again_and_says_so(
    data: DataConfig, tokenizer: ToyTokenizer, caplog: pytest.LogCaptureFixture, file: str, damage, said: str
) -> None:
    fingerprint = prepare(data, tokenizer, seed=0).train.fingerprint
    calls = tokenizer.calls
    damage(folder_of(data) / file)
    with caplog.at_level(logging.WARNING):
        corpus = prepare(data, tokenizer, seed=0)
    assert tokenizer.calls > calls
    assert said in caplog.text
    assert "building it again" in caplog.text
    assert corpus.train.fingerprint == fingerprint
    assert sorted(documents_of(corpus.train) + documents_of(corpus.held_out)) == sorted(TEXTS)


def test_above_the_hash_limit_sizes_are_still_checked(
    data: DataConfig, tokenizer: ToyTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(data, tokenizer, seed=0)
    monkeypatch.setattr(store_module, "HASH_CHECK_BYTES", 0)
    calls = tokenizer.calls
    cut(folder_of(data) / "train.tokens")
    prepare(data, tokenizer, seed=0)
    assert tokenizer.calls > calls


CHILD = """
import os, signal, sys, time
from pathlib import Path
from sparsek_dist.data import corpus
from tests.data.toys import ToyTokenizer, config_for

path, behaviour = Path(sys.argv[1]), sys.argv[2]
load, add = corpus.load_documents, corpus.StoreWriter.add
added = 0

def slow_load(*args, **keywords):
    with open(path.parent / "builds", "a") as file:
        file.write("build\\n")
    time.sleep(1.0)
    return load(*args, **keywords)

def deadly_add(self, *args):
    global added
    added += 1
    if added == 20:
        os.kill(os.getpid(), signal.SIGKILL)
    add(self, *args)

corpus.load_documents = slow_load
if behaviour == "die":
    corpus.StoreWriter.add = deadly_add
built = corpus.prepare(config_for(path, held_out=0.1), ToyTokenizer(), seed=0)
print(built.train.fingerprint, built.held_out.fingerprint)
"""


def start_child(data: DataConfig, behaviour: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, data.path, behaviour]
    root = Path(__file__).parents[2]
    return subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_at_once_build_it_once(data: DataConfig) -> None:
    children = [start_child(data, "build") for _ in range(2)]
    outputs = [child.communicate(timeout=60) for child in children]
    assert [child.returncode for child in children] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    assert (Path(data.path).parent / "builds").read_text() == "build\n"
    assert sum("waiting for another process" in errors for _, errors in outputs) == 1
    tokenizer = ToyTokenizer()
    corpus = prepare(data, tokenizer, seed=0)
    assert tokenizer.calls == 0
    assert outputs[0][0].split() == [corpus.train.fingerprint, corpus.held_out.fingerprint]


def test_a_killed_build_leaves_nothing_that_counts(data: DataConfig) -> None:
    child = start_child(data, "die")
    child.communicate(timeout=60)
    assert child.returncode == -signal.SIGKILL
    assert len(list(Path(data.cache).glob("*.partial"))) == 1, "the child must die while it writes"
    assert not list(Path(data.cache).glob("*/index.json"))
    corpus = prepare(data, ToyTokenizer(), seed=0)
    assert corpus.train.num_documents + corpus.held_out.num_documents == len(TEXTS)
    assert not list(Path(data.cache).glob("*.partial"))


def test_a_failed_build_leaves_no_folder(data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(corpus_module.StoreWriter, "add", full)
    with pytest.raises(DataError, match=r"data\.cache = .*No space left.*free space"):
        prepare(data, ToyTokenizer(), seed=0)
    assert not [path for path in Path(data.cache).iterdir() if path.is_dir() and "documents" not in path.name]


def test_ids_outside_the_vocabulary_are_refused(data: DataConfig) -> None:
    with pytest.raises(DataError, match=r"data\.tokenizer .* ends at 99"):
        prepare(data, ToyTokenizer(vocab_size=100), seed=0)


def test_a_tokenizer_without_eos_is_refused_and_without_bos_is_not(data: DataConfig, tokenizer: ToyTokenizer) -> None:
    tokenizer.bos_token_id = None
    assert int(prepare(data, tokenizer, seed=0).train.tokens[0]) == EOS
    tokenizer.eos_token_id = None
    with pytest.raises(ConfigError, match=r"data\.tokenizer .* end-of-sequence"):
        prepare(data, tokenizer, seed=0)


@pytest.mark.parametrize(("count", "share", "held_out"), [(2, 0.01, 1), (2, 0.99, 1), (10, 0.99, 9), (10, 0.26, 3)])
def test_neither_split_is_ever_empty(tmp_path: Path, count: int, share: float, held_out: int) -> None:
    data = config_for(write_jsonl(tmp_path / "a.jsonl", TEXTS[:count]), held_out=share)
    corpus = prepare(data, ToyTokenizer(), seed=0)
    assert (corpus.held_out.num_documents, corpus.train.num_documents) == (held_out, count - held_out)


def test_one_document_cannot_be_split(tmp_path: Path) -> None:
    data = config_for(write_jsonl(tmp_path / "a.jsonl", ["alone", " "]))
    with pytest.raises(DataError, match=r"data\.path = .* one document"):
        prepare(data, ToyTokenizer(), seed=0)


def test_an_unwritable_cache_is_named(data: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data\.cache = .*file/cache"):
        prepare(DataConfig(path=data.path, cache=str(tmp_path / "file" / "cache")), ToyTokenizer(), seed=0)


def test_documents_longer_than_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "_BATCH_CHARACTERS", 30)
    texts = ["a" * 100, "b", "c" * 31, "d" * 29, "e"]
    corpus = prepare(config_for(write_jsonl(tmp_path / "a.jsonl", texts)), ToyTokenizer(), seed=0)
    assert sorted(documents_of(corpus.train) + documents_of(corpus.held_out)) == texts


def test_a_slice_of_the_standard_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = Path(sysconfig.get_paths()["stdlib"]) / "email"
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(part)})
    data = DataConfig(cache=str(tmp_path / "cache"), held_out=0.2)
    tokenizer = ToyTokenizer()
    corpus: Corpus = prepare(data, tokenizer, seed=0)
    expected = sorted(text for text in (file.read_bytes().decode() for file in part.rglob("*.py")) if text.strip())
    assert sorted(documents_of(corpus.train) + documents_of(corpus.held_out)) == expected
    assert len(load_documents(data)) == len(expected)
    assert corpus.train.num_bytes + corpus.held_out.num_bytes == sum(len(text.encode()) for text in expected)
    assert len(expected) > 10
