"""Haystacks with needles: texts of a given length that say something once, and ask for it at the end.

Passkey retrieval is that of Mohtashami and Jaggi 2023 (arXiv 2305.16300), section 4.2. Two more are after RULER (arXiv
2404.06654): several needles of which one is asked for, its multi-key task; and a chain, in which each needle refers to
the one before, after its variable tracking. All words are ours and every draw follows from the seed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from sparsek_dist.errors import ConfigError

Task = Literal["passkey", "needles", "chain"]
DIGITS = 5
_PIECE = re.compile(r".{1,200}?(?:[.!?]\s+|\n+|$)|.{1,200}", re.DOTALL)
_SUBJECTS = ("The miller", "A heron", "The old ferry", "Her neighbour", "The night train", "A grey cat", "The baker")
_VERBS = ("waits beside", "walks along", "looks across", "turns away from", "comes back to", "passes", "remembers")
_OBJECTS = ("the river", "the orchard", "a wooden gate", "the market square", "the harbour wall", "an empty field")
_TIMES = ("in the morning", "before the rain", "every autumn", "after supper", "when the bells ring", "without a word")
NAMES = (
    "amber",
    "birch",
    "copper",
    "dune",
    "ember",
    "fern",
    "granite",
    "hazel",
    "indigo",
    "juniper",
    "lilac",
    "maple",
)
MAX_NEEDLES = len(NAMES)


def needle(key: str, name: str = "") -> str:
    """What a text says once: the pass key, or that of a name."""
    return f"The pass key{f' of {name}' if name else ''} is {key}. Remember it. "


def question(name: str = "") -> str:
    """What it asks for at its end; " KEY" comes next. The space goes with the number, as most tokenizers have it."""
    return f"What is the pass key{f' of {name}' if name else ''}? The pass key is"


@dataclass(frozen=True)
class Sample:
    """Token ids: what the model reads, and what it should write next."""

    prompt: list[int]
    answer: list[int]


class Haystacks:
    """Makes samples for one tokenizer. The same arguments give the same sample, whatever was made before."""

    def __init__(
        self,
        encode: Callable[[str], list[int]],
        first_token: int,
        *,
        task: Task,
        num_needles: int,
        seed: int,
        text: str | None = None,
    ) -> None:
        """
        Args:
            encode: text -> ids, without special tokens.
            first_token: what every document begins with.
            num_needles: for `needles`, pass keys in one text, and for `chain`, links: 1 to 12.
            text: what the hay is made of; None for sentences of our own.

        Raises:
            ConfigError: for another number of needles, or a text of nothing but white space.
        """
        if not 1 <= num_needles <= MAX_NEEDLES:
            raise ConfigError(f"--needles = {num_needles} must be from 1 to {MAX_NEEDLES}")
        if text is not None and not text.strip():
            raise ConfigError("--data holds no text to hide a needle in: give another")
        self._encode, self._first, self._task, self._seed = encode, first_token, task, seed
        self._num_needles = 1 if task == "passkey" else num_needles
        self._pieces = None if text is None else _PIECE.findall(text)

    def sample(self, length: int, depth: float, index: int) -> Sample:
        """A text whose prompt and answer together are at most `length` tokens, and less than one sentence shorter.

        Samples of one length and index differ between depths only in where the needle stands.

        Args:
            length: tokens, the first one included.
            depth: of the needle that is asked for: 0 at the beginning of the text, 1 right before the question.
            index: which of many.

        Raises:
            ConfigError: if the length has no room for the needles and the question.
        """
        draw = np.random.default_rng([self._seed, length, index])
        names = [NAMES[i] for i in draw.permutation(MAX_NEEDLES)[: self._num_needles]]
        keys = [f"{key:0{DIGITS}d}" for key in draw.choice(10**DIGITS, self._num_needles, replace=False).tolist()]
        others = draw.random(self._num_needles - 1)
        if self._task == "chain":
            # A link stands after the one it refers to.
            others = depth + (1 - depth) * np.sort(others)
        needles = [self._encode(said) for said in self._said(names, keys)]
        asked = self._encode(question({"passkey": "", "needles": names[0], "chain": names[-1]}[self._task]))
        answer = self._encode(f" {keys[0]}")
        room = length - 1 - sum(map(len, needles)) - len(asked) - len(answer)
        if room < 0:
            raise ConfigError(f"--lengths = {length} is too short: needles and question alone take {length - room}")
        hay = self._hay(draw, room)
        places = [round(place * len(hay)) for place in (depth, *others)]
        # From the last place to the first, so that earlier places stay where they are; of one place, the last link
        # first, so that the others come before it.
        pairs = list(zip(places, needles, strict=True))
        for place, said in sorted(pairs[::-1] if self._task == "chain" else pairs, key=lambda pair: -pair[0]):
            hay.insert(place, said)
        return Sample([self._first, *(token for piece in hay for token in piece), *asked], answer)

    def _said(self, names: list[str], keys: list[str]) -> list[str]:
        """What the needles say; the first holds the answer."""
        if self._task == "passkey":
            return [needle(keys[0])]
        if self._task == "needles":
            return [needle(key, name) for name, key in zip(names, keys, strict=True)]
        return [needle(keys[0], names[0]), *(needle(f"that of {before}", name) for before, name in pairwise(names))]

    def _hay(self, draw: np.random.Generator, room: int) -> list[list[int]]:
        """Sentences, each as ids, until the next one would not fit."""
        hay: list[list[int]] = []
        place = 0 if self._pieces is None else int(draw.integers(len(self._pieces)))
        while True:
            words = _sentence(draw) if self._pieces is None else self._pieces[(place + len(hay)) % len(self._pieces)]
            ids = self._encode(words)
            if not ids or len(ids) > room:
                return hay
            hay.append(ids)
            room -= len(ids)


def _sentence(draw: np.random.Generator) -> str:
    parts: Sequence[Sequence[str]] = (_SUBJECTS, _VERBS, _OBJECTS, _TIMES)
    return " ".join(words[int(draw.integers(len(words)))] for words in parts) + ". "
