"""The simulation of scaling counts the bytes that the exchange counts, and says that it is one."""

import importlib.util
import math
import sys
from pathlib import Path

import pytest

from sparsek_dist.attention.exchange import received_per_layer

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def scaling():
    spec = importlib.util.spec_from_file_location("scaling", ROOT / "benchmarks" / "scaling.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["scaling"] = module
    spec.loader.exec_module(module)
    return module


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
    assert scaling.seconds(method, p, layer, free, slow, 1024) == pytest.approx(2 * told)
    assert scaling.seconds(method, p, layer, free, slow, 1) == pytest.approx(4 * told)


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
