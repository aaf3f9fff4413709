"""Whether a model finds what a long text said once: likelihood of the answer, and what it writes by itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from sparsek_dist.data.loader import Batch
from sparsek_dist.evaluation.haystack import DIGITS, Haystacks, Sample
from sparsek_dist.evaluation.shards import Sharing
from sparsek_dist.parallel.loss import IGNORE

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
    sharing: Sharing | None = None,
    told: Callable[[Cell], object] = lambda cell: None,
) -> list[Cell]:
    """One cell per length and depth, one sample at a time.

    Every rank of `sharing` must call it with the same arguments, and gets the same cells.

    Args:
        model: a transformers model in evaluation mode. In one process its generate() writes the answer, with the
            constant-size cache; ranks that share each text have none, and see in one pass what it would write.
        sharing: the ranks that share each text, as `model` does; None for one process.
        told: called with each cell as soon as it is known.
    """
    cells, shared = [], sharing or Sharing()
    for length in lengths:
        for depth in depths:
            results = [_answer(model, haystacks.sample(length, depth, i), shared) for i in range(samples)]
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
def _answer(model: Any, sample: Sample, sharing: Sharing) -> tuple[float, bool]:
    """log p(answer), and whether greedy decoding writes it."""
    likelihood, likeliest = in_one_pass(model, sample, sharing)
    return likelihood, likeliest if sharing.group.size > 1 else _written(model, sample) == sample.answer


@torch.no_grad()
def in_one_pass(model: Any, sample: Sample, sharing: Sharing) -> tuple[float, bool]:
    """log p(answer) in one pass without a cache, and whether each of its tokens is the likeliest after those before.

    That is when greedy decoding writes it: every token is drawn after the same ones.
    """
    # The last answer token predicts nothing that is asked for.
    ids = torch.tensor([sample.prompt + sample.answer[:-1]])
    labels = torch.full_like(ids, IGNORE)
    labels[0, -len(sample.answer) :] = torch.tensor(sample.answer)
    mine = sharing.shard(Batch(ids, labels, torch.arange(ids.shape[1])[None]), model.device)
    asked = mine.labels != IGNORE
    places = asked[0].nonzero().flatten()
    # Of a long shard, all logits would be more than fits; here they are a few rows, or none.
    output = model(input_ids=mine.input_ids, position_ids=mine.position_ids, use_cache=False, logits_to_keep=places)
    logits = output.logits[0]
    wanted, precise = mine.labels[asked], logits.to(torch.promote_types(logits.dtype, torch.float32))
    # [b, s, (nats, whether it is the likeliest)], 0 where nothing is asked.
    told = torch.zeros(*asked.shape, 2, dtype=torch.float64, device=logits.device)
    nats = F.cross_entropy(precise, wanted, reduction="none")
    told[asked] = torch.stack([nats, precise.argmax(-1) == wanted], dim=-1).double()
    total, right = sharing.whole(told, ids.shape[1]).sum(dim=(0, 1)).tolist()
    return -total, right == len(sample.answer)


def _written(model: Any, sample: Sample) -> list[int]:
    """What greedy decoding writes after the prompt, with the cache of constant size."""
    prompt = torch.tensor([sample.prompt], device=model.device)
    written = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=len(sample.answer),
        do_sample=False,
        num_beams=1,
        # A model's own generation settings may hold one, and digits repeat.
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        pad_token_id=0,
        use_cache=True,
    )
    return written[0, prompt.shape[1] :].tolist()
