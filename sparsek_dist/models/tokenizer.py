"""Text to token ids: the built-in byte-level tokenizer, or any fast tokenizer of transformers."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sparsek_dist.errors import ConfigError

END_OF_TEXT = "<|endoftext|>"
"""The one special token of the byte-level tokenizer: id 256, both first and last token of every document."""


def load_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer called `name` in `data.tokenizer`.

    Args:
        name: `bytes` for the built-in one (257 ids, nothing downloaded), otherwise a folder or hub id. Code that
            comes with a hub repository is never run.

    Raises:
        ConfigError: it cannot be loaded, is not a fast one, or has no token that ends a document.
    """
    if name == "bytes":
        return _byte_tokenizer()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"data.tokenizer = {name!r} cannot be loaded: use `bytes`, a folder with a tokenizer.json, or a hub id "
            f"that is cached or reachable (HF_HUB_OFFLINE unset); transformers says: {reason}"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ConfigError(
            f"data.tokenizer = {name!r} is a {type(tokenizer).__name__}, which has no tokenizer.json: "
            "convert it with transformers' save_pretrained to a fast one, or use `bytes`"
        )
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"data.tokenizer = {name!r} has no end-of-sequence token, so documents would run into each other: "
            "set eos_token in its tokenizer_config.json, or use `bytes`"
        )
    return tokenizer


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """Id of a byte = its value. Exact for any text, because `<|endoftext|>` in a text is read as its 13 bytes."""
    vocabulary = {character: byte for byte, character in enumerate(_printable_bytes())}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    # Without the word regex a document is one piece; a BPE without merges is linear in its length.
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )


def _printable_bytes() -> list[str]:
    """The character by which byte-level tokenizers write each byte: itself where Latin-1 prints it, else U+0100 on.

    Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.2; fixed by `ByteLevel`.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    substitutes = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(substitutes)) for byte in range(256)]
