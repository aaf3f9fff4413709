"""Losses without logits are the losses of the logits, and so are their gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sparsek_dist.parallel import head
from sparsek_dist.parallel.head import token_losses
from sparsek_dist.parallel.loss import IGNORE, losses
from tests.models.tiny import MODELS, tiny_model, tokens
from tests.parallel.largest import Largest

ROWS = 5
"""Tokens of a tile; no length here is a multiple of it."""


class Bare(nn.Module):
    """Hidden states are parameters: nothing but a head."""

    def __init__(self, tokens: int, width: int, vocabulary: int, *, bias: bool) -> None:
        super().__init__()
        self.hidden = nn.Parameter(torch.randn(1, tokens, width))
        self.head = nn.Linear(width, vocabulary, bias=bias)

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def forward(self, input_ids: Tensor, position_ids: Tensor):
        return type("Output", (), {"logits": self.head(self.hidden)})


def random_labels(b: int, s: int, vocabulary: int) -> Tensor:
    labels = torch.randint(vocabulary, (b, s))
    labels[:, ::3] = IGNORE
    return labels


@pytest.fixture
def tiles(monkeypatch) -> list[int]:
    """Tokens of the calls whose losses came in tiles, whatever tiles would cost."""
    seen: list[int] = []
    giving = head._giving_losses

    def told(module: nn.Linear, labels: Tensor):
        seen.append(labels.numel())
        return giving(module, labels)

    monkeypatch.setattr(head, "_giving_losses", told)
    monkeypatch.setattr(head, "_worth_tiles", lambda module, n: n * module.out_features > head.NUMBERS_AT_ONCE)
    return seen


def both(model: nn.Module, ids: Tensor, labels: Tensor, monkeypatch, vocabulary: int) -> list[list[Tensor]]:
    """Losses and all gradients, with whole logits and in tiles; every token's loss has a weight of its own."""
    positions = torch.arange(ids.shape[1]).expand(ids.shape)
    weights = torch.rand(labels.shape, dtype=torch.float64)
    results = []
    for numbers in (ids.numel() * vocabulary, ROWS * vocabulary):
        monkeypatch.setattr(head, "NUMBERS_AT_ONCE", numbers)
        found = token_losses(model, ids, positions, labels)
        learned = [p for p in model.parameters() if p.requires_grad]
        grads = torch.autograd.grad((found.double() * weights).sum(), learned, allow_unused=True)
        results.append([found.detach(), *(g for g in grads if g is not None)])
    return results


@pytest.mark.parametrize(
    "frozen", [(), ("head.weight",), ("hidden",), ("hidden", "head.bias"), ("head.weight", "head.bias")]
)
@pytest.mark.parametrize("bias", [True, False])
def test_gradients(bias: bool, frozen: tuple[str, ...], monkeypatch, tiles) -> None:
    model = Bare(23, 7, 31, bias=bias).double()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    whole, tiled = both(model, torch.zeros(1, 23, dtype=torch.long), random_labels(1, 23, 31), monkeypatch, 31)
    assert len(whole) == len(tiled) == 1 + sum(p.requires_grad for p in model.parameters())
    for expected, found in zip(whole, tiled, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert "forward" not in vars(model.head) and tiles == [23]


@pytest.mark.parametrize("name", MODELS)
def test_every_family(name: str, monkeypatch, tiles) -> None:
    """Tied embeddings, biases, scaled or capped logits: in float64, with a batch of two."""
    model = tiny_model(name)
    if capped := name == "gemma3_text":
        model.config.final_logit_softcapping = 0.01
    ids, vocabulary = tokens(23), model.config.vocab_size
    whole, tiled = both(model, ids, random_labels(*ids.shape, vocabulary), monkeypatch, vocabulary)
    assert len(whole) == len(tiled) > 5
    assert tiles == ([] if capped or name == "granite" else [46])
    for expected, found in zip(whole, tiled, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("learn", [True, False], ids=["training", "evaluation"])
def test_no_logits_are_held(learn: bool, monkeypatch, tiles) -> None:
    vocabulary, labels = 211, random_labels(1, 203, 211)
    model = Bare(203, 3, vocabulary, bias=False)
    monkeypatch.setattr(head, "NUMBERS_AT_ONCE", 10 * vocabulary)
    with torch.set_grad_enabled(learn), Largest() as largest:
        total = token_losses(model, labels, labels, labels).sum()
        if learn:
            total.backward()
    assert largest.numbers <= 10 * vocabulary


def test_few_tokens_are_computed_as_ever(monkeypatch) -> None:
    """And the head is left alone: no tile is computed twice where all fit."""
    model, labels = Bare(4, 3, 5, bias=False), random_labels(1, 4, 5)
    monkeypatch.setattr(head, "_giving_losses", None)
    found = token_losses(model, labels, labels, labels)
    assert torch.equal(found, losses(model(labels, labels).logits, labels))


def test_gradients_of_the_head_are_summed_in_float32(monkeypatch, tiles) -> None:
    """400 tiles: in bfloat16, a sum that is 256 times a summand no longer grows."""
    model = Bare(400, 1, 2, bias=False).bfloat16()
    nn.init.ones_(model.hidden)
    monkeypatch.setattr(head, "NUMBERS_AT_ONCE", 2)
    labels = torch.zeros(1, 400, dtype=torch.long)
    token_losses(model, labels, labels, labels).sum().backward()
    exact = 400 * (torch.softmax(model.head.weight.detach().double()[:, 0], 0) - torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(model.head.weight.grad.double()[:, 0], exact, rtol=0.01, atol=0)


def test_tiles_where_they_take_less(monkeypatch) -> None:
    """Their float32 sum of the head's gradient must be less than what they save."""
    monkeypatch.setattr(head, "NUMBERS_AT_ONCE", 1)
    linear = nn.Linear(8, 31)
    assert [n for n in (15, 16, 17) if head._worth_tiles(linear, n)] == [17]
    with torch.no_grad():
        assert head._worth_tiles(linear, 1)
    linear.weight.requires_grad_(False)
    assert head._worth_tiles(linear, 1)


def test_logits_that_are_whole_nevertheless_are_told_of(monkeypatch, caplog) -> None:
    head._log_once.cache_clear()
    model, ids = tiny_model("granite"), tokens(9)
    monkeypatch.setattr(head, "NUMBERS_AT_ONCE", 5)
    for _ in range(2):
        token_losses(model, ids, torch.arange(9).expand(ids.shape), ids)
    (record,) = caplog.records
    assert "held whole" in record.getMessage()
