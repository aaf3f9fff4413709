"""Pass keys hidden in real text: written over places of the contexts trained on, and hidden in held-out text for tests.

Without training on them, no model this small would know what the question means. Every second context is trained on
with up to 12 pass keys: each is told once, by its name, and asked for once, later in the same context. The others, and
how many there are, are left to chance, so that a model that has seen none for long does not take one to be due: it
then loses bits on every text without any. What is tested was not trained on: other numbers, in other text. Words,
lengths and depths are those of `sparsek eval`'s task `needles`.
"""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np

from benchmarks.quality.scales import Scale
from sparsek_dist.evaluation.haystack import DIGITS, MAX_NEEDLES, NAMES, Haystacks, needle, question
from sparsek_dist.evaluation.retrieval import in_one_pass
from sparsek_dist.evaluation.shards import Sharing

SLOT = 64
"""Bytes that a needle, or a question and its answer, have to themselves."""
DEPTHS = (0.0, 0.5)
"""Of the needle that is asked for: at the beginning, in the middle."""


def write_keys(tokens: np.ndarray, seed: tuple[int, ...]) -> None:
    """Writes needles and their questions over a text of bytes [n], in place: at most 12 of each, and over 3/4 of it."""
    draw = np.random.default_rng(seed)
    slots = len(tokens) // SLOT
    pairs = int(draw.integers(min(MAX_NEEDLES, max(1, 3 * slots // 8)))) + 1
    places = SLOT * np.sort(draw.permutation(slots)[: 2 * pairs].reshape(pairs, 2), axis=1)
    names = draw.permutation(MAX_NEEDLES)[:pairs]
    keys = draw.choice(10**DIGITS, pairs, replace=False)
    for (told, asked), name, number in zip(places.tolist(), names.tolist(), keys.tolist(), strict=True):
        key = f"{number:0{DIGITS}d}"
        _write(tokens, told, needle(key, NAMES[name]))
        _write(tokens, asked, f"{question(NAMES[name])} {key}. ")


def _write(tokens: np.ndarray, place: int, words: str) -> None:
    written = f"\n{words.strip()}\n".encode()
    assert len(written) <= SLOT
    tokens[place : place + len(written)] = list(written)


def hidden_keys(text: str, first_token: int, scale: Scale) -> Haystacks:
    """Tests: stretches of `text` with `scale.needles` pass keys each."""
    number = scale.needles
    return Haystacks(lambda x: list(x.encode()), first_token, task="needles", num_needles=number, seed=0, text=text)


def find_keys(model: Any, haystacks: Haystacks, scale: Scale, *, longest: int) -> list[dict[str, Any]]:
    """Per length and depth the share of answers that greedy decoding would write, and their log likelihood in nats."""
    cells = []
    for length in (length for length in scale.passkey_lengths if length <= longest):
        for depth in DEPTHS:
            samples = [haystacks.sample(length, depth, index) for index in range(scale.passkey_samples)]
            found = [in_one_pass(model, sample, Sharing()) for sample in samples]
            likelihoods, right = zip(*found, strict=True)
            means = {"accuracy": statistics.mean(right), "log_likelihood": statistics.mean(likelihoods)}
            cells.append({"length": length, "depth": depth, "samples": len(samples)} | means)
    return cells
