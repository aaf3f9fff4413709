"""The byte-level tokenizer is exact and fast; other tokenizers load, or say why not."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sparsek_dist.errors import ConfigError
from sparsek_dist.models.tokenizer import END_OF_TEXT, load_tokenizer

BYTES = load_tokenizer("bytes")


@settings(max_examples=300, deadline=None)
@given(st.text())
@example(f"a{END_OF_TEXT}b")
@example("".join(map(chr, range(0x300))))
@example("e\u0301 \u00e9 \U0001f600\r\n\0 , . ' s")
def test_ids_are_the_bytes_and_decode_gives_the_text_back(text: str) -> None:
    ids = BYTES(text)["input_ids"]
    assert ids == list(text.encode())
    assert BYTES.backend_tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids == ids
    assert BYTES.decode(ids) == text


def test_the_special_token() -> None:
    assert len(BYTES) == 257
    assert BYTES.bos_token_id == BYTES.eos_token_id == 256
    assert BYTES.decode([104, 256]) == "h" + END_OF_TEXT
    assert BYTES.decode([104, 256], skip_special_tokens=True) == "h"


def test_saved_and_loaded_again_it_is_the_same(tmp_path: Path) -> None:
    BYTES.save_pretrained(tmp_path)
    text = f"a{END_OF_TEXT}b \u6f22\r\n"
    for loaded in (
        load_tokenizer(str(tmp_path)),
        AutoTokenizer.from_pretrained(tmp_path),
        PreTrainedTokenizerFast.from_pretrained(tmp_path),
    ):
        assert loaded(text)["input_ids"] == list(text.encode())
        assert loaded.decode(list(text.encode())) == text
        assert (len(loaded), loaded.bos_token_id, loaded.eos_token_id) == (257, 256, 256)
        assert loaded.backend_tokenizer.to_str() == BYTES.backend_tokenizer.to_str()


@pytest.mark.parametrize("word", ["a", " ", "\u6f22", "x y\n"])
def test_a_long_document_takes_linear_time(word: str) -> None:
    # A quadratic pre-tokenizer or model would need minutes for 1 MB; the bound leaves room for a busy machine.
    text = word * (1_000_000 // len(word.encode()))
    start = time.perf_counter()
    (encoding,) = BYTES.backend_tokenizer.encode_batch_fast([text], add_special_tokens=False)
    assert time.perf_counter() - start < 5.0
    assert bytes(encoding.ids) == text.encode()


def word_tokenizer(folder: Path, **keywords: str) -> Path:
    backend = Tokenizer(WordLevel({"[UNK]": 0, "</s>": 1, "hello": 2}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", **keywords).save_pretrained(folder)
    return folder


def test_another_tokenizer_from_a_folder(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(word_tokenizer(tmp_path, eos_token="</s>")))
    assert tokenizer("hello", add_special_tokens=False)["input_ids"] == [2]
    assert tokenizer.eos_token_id == 1


def refused(name: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_tokenizer(name)
    message = str(caught.value)
    assert message.startswith(f"data.tokenizer = {name!r}")
    assert "use `bytes`" in message
    assert "\n" not in message
    return message


def test_what_cannot_be_loaded_is_named_with_a_cure(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(str(tmp_path / "empty"))
    refused(str(tmp_path / "missing"))
    assert "end-of-sequence" in refused(str(word_tokenizer(tmp_path / "no_eos")))
    broken = word_tokenizer(tmp_path / "broken", eos_token="</s>")
    (broken / "tokenizer.json").write_text('{"version": "1.0", "mod')
    refused(str(broken))
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))
    assert "no tokenizer.json" in refused(str(slow))


def test_code_in_a_tokenizer_folder_is_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    configuration = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(configuration))
    refused(str(tmp_path))
    assert not marker.exists()
