"""Whether a model finds what a long text said once: likelihood of the answer, and what it writes by itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sparsek_dist.evaluation.haystack import DIGITS, Haystacks, Sample

CHANCE = -DIGITS * math.log(10)
"""Log likelihood in nats of the digits, for who knows that digits come and nothing else."""


@dataclass(frozen=True)
class Cell:
    """All samples of one length and depth."""

    length: int
    depth: float
    samples: int
    accuracy: float
    """Share of samples whose greedy continuation is the answer, token for token."""
    accuracy_error: float
    """Standard error of a share: 0 where all samples agree, which few samples do easily."""
    log_likelihood: float
    """Mean of log p(answer | text), in nats; see `CHANCE`."""
    log_likelihood_error: float


def retrieve(
    model: Any,
    haystacks: Haystacks,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    samples: int,
    told: Callable[[Cell], object] = lambda cell: None,
) -> list[Cell]:
    """One cell per length and depth, one sample at a time.

    Args:
        model: a transformers model in evaluation mode; its generate() then runs with the constant-size cache.
        told: called with each cell as soon as it is known.
    """
    cells = []
    for length in lengths:
        for depth in depths:
            results = [_answer(model, haystacks.sample(length, depth, index)) for index in range(samples)]
            cells.append(_cell(length, depth, results))
            told(cells[-1])
    return cells


def _cell(length: int, depth: float, results: list[tuple[float, bool]]) -> Cell:
    likelihoods = torch.tensor([likelihood for likelihood, _ in results], dtype=torch.float64)
    number = len(results)
    share = sum(found for _, found in results) / number
    spread = float(likelihoods.std()) if number > 1 else math.nan
    return Cell(
        length=length,
        depth=depth,
        samples=number,
        accuracy=share,
        accuracy_error=math.sqrt(share * (1 - share) / number),
        log_likelihood=float(likelihoods.mean()),
        log_likelihood_error=spread / math.sqrt(number),
    )


@torch.no_grad()
def _answer(model: Any, sample: Sample) -> tuple[float, bool]:
    """log p(answer) with the answer given piece by piece, and whether greedy decoding writes it."""
    prompt = torch.tensor([sample.prompt], device=model.device)
    answer = torch.tensor([sample.answer], device=model.device)
    number = answer.shape[1]
    # The last answer token predicts nothing that is asked for.
    logits = model(input_ids=torch.cat([prompt, answer[:, :-1]], dim=1), use_cache=False).logits[:, -number:]
    precise = logits if logits.dtype == torch.float64 else logits.float()
    likelihood = precise.log_softmax(-1).gather(-1, answer[..., None]).sum()
    written = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=number,
        do_sample=False,
        num_beams=1,
        # A model's own generation settings may hold one, and digits repeat.
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        pad_token_id=0,
        use_cache=True,
    )
    return float(likelihood), written[0, prompt.shape[1] :].tolist() == sample.answer
