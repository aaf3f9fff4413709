"""The simulation of scaling counts the bytes that the exchange counts, says that it is one, and is checked."""

import importlib
import json
import math
import sys
from pathlib import Path

import pytest

from sparsek_dist.attention.exchange import received_per_layer

ROOT = Path(__file__).parent.parent


BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(scope="module")
def scaling():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("scaling")
    finally:
        sys.path.remove(str(BENCHMARKS))


def _layer(scaling, **changes):
    values = {"query_heads": 8, "kv_heads": 4, "head_dim": 16, "num_selected": 32, "window": 24, "support": 80}
    values |= {"length": 4096, "pair_bytes": 2, "sparse_seconds_per_token": 0.0, "dense_seconds_per_pair": 0.0}
    return scaling.Layer(**(values | changes))


@pytest.mark.parametrize("method", ["all_gather", "scan"])
@pytest.mark.parametrize("p", [2, 8, 64])
def test_bytes_are_those_of_the_exchange(scaling, method, p):
    layer = _layer(scaling)
    free, slow = scaling.Link(latency=0.0, bandwidth=1.0), scaling.Link(latency=0.0, bandwidth=0.5)
    told = received_per_layer(
        p, window=24, num_selected=32, support=80, num_kv_heads=4, head_dim=16, pair_bytes=2, exchange=method
    )
    # Backward without positions; gradients of pairs in float32 where they are summed on the way.
    rounds = p - 1 if method == "all_gather" else (p - 1).bit_length()
    back = told - rounds * 4 * 4 * 80 + rounds * 4 * 2 * 16 * 32 * (2 if method == "all_gather" else 0)
    assert scaling.seconds(method, p, layer, free, slow, 1024) == pytest.approx(told + back)
    assert scaling.seconds(method, p, layer, free, slow, 1) == pytest.approx(2 * (told + back))


@pytest.mark.parametrize(("method", "rounds"), [("all_gather", 7), ("scan", 3)])
def test_scores_and_pairs_are_messages_of_their_own(scaling, method, rounds):
    link = scaling.Link(latency=1.0, bandwidth=math.inf)
    # The halo and all rounds, forward and backward.
    assert scaling.seconds(method, 8, _layer(scaling), link, link, 8) == 2 * (1 + 2 * rounds)


def test_what_cannot_run_is_left_out(scaling):
    link = scaling.Link(latency=0.0, bandwidth=1.0)
    assert math.isnan(scaling.seconds("ulysses", 8, _layer(scaling), link, link, 8))
    assert math.isnan(scaling.seconds("scan", 256, _layer(scaling), link, link, 8))
    dense = _layer(scaling, dense_seconds_per_pair=1.0)
    assert scaling.seconds("ring", 4, dense, link, link, 8) >= 4096**2 / 8


def test_it_prints_a_table_and_writes_a_labelled_plot(scaling, monkeypatch, tmp_path, capsys):
    arguments = ["--sparse-us-per-token", "1.5", "--dense-ps-per-pair", "3", "--plot", str(tmp_path / "plot.svg")]
    monkeypatch.setattr(sys, "argv", ["scaling.py", *arguments])
    scaling.main()
    assert "SIMULATION, not measured" in capsys.readouterr().out
    assert (tmp_path / "plot.svg").stat().st_size > 1000


def _results(folder: Path) -> list[str]:
    """As two_gpus.py and attention.py write them: 2 us per token, 4 ps per pair, a link of 1 ms and 1 GB/s."""
    machine = {"name": "GPU", "driver": "1", "torch": "2", "commit": "c"}
    layer = {"heads": "h32 g8 d128", "budget": 1024, "kind": "sparsek"}
    one = [layer | {"gpus": 1, "tokens": n, "milliseconds": 2e-3 * n} for n in (4096, 8192)]
    two = [layer | {"gpus": 2, "tokens": 8192, "milliseconds": 100.0}]
    links = [{"num_bytes": n, "exchange": 1e-3 + n / 1e9, "all_gather": 1.0} for n in (1, 1 << 20, 1 << 30)]
    dense = {"shape": "h32 g8 d128", "method": "cudnn", "budget": 1024, "scores": "random", "length": 1000}
    dense["step"] = 2e-3
    contents = {
        "two_gpus.json": {"machine": machine, "gpus": 2, "layer": one + two, "links": links},
        "attention.json": {"machine": machine, "rows": [dense]},
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content))
    return [str(folder / name) for name in contents]


def test_constants_come_from_measurements(scaling, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--measured", *_results(tmp_path)])
    scaling.main()
    printed = " ".join(capsys.readouterr().out.split())
    assert "2 us per token, 4 ps per pair; in a machine 1000 us, 1 GB/s" in printed
    # Two shards of 8192 tokens; halos and summaries of 8 heads, 128 wide, in bfloat16, and six messages of 1 ms.
    halo, pairs, support = 8 * 1023 * 516, 8 * 2 * 128 * 1024, 8 * 4096
    expected = 2e-3 * 8192 + 6 + 1e-6 * (2 * halo + pairs * (2 + 4) + support * (8 + 4))
    assert f"100.00 │ {expected:.2f} │ {expected / 100:.2f}" in printed


def test_what_is_missing_is_named(scaling, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--head-dim", "64", "--measured", *_results(tmp_path)])
    with pytest.raises(SystemExit, match=r"--sparse-us-per-token.*h32 g8 d64"):
        scaling.main()
