"""Every configuration that is shipped loads, and runs on the number of processes it is meant for."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsek_dist.config import Config, flatten
from sparsek_dist.errors import ConfigError
from sparsek_dist.relations import check_world_size
from sparsek_dist.settings import from_yaml, load, to_yaml

ROOT = Path(__file__).parent.parent
SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_configurations_load(path):
    config = load(path)
    check_world_size(config, config.parallel.sequence_degree)
    assert config.run.name == path.stem


def test_yaml_round_trip_keeps_every_setting(tmp_path):
    config = load(SHIPPED[0], ["train.steps=7", "parallel.deepspeed={comms_logger: {enabled: true}}"])
    assert from_yaml(to_yaml(config)) == config
    assert flatten(config)["train.steps"] == 7


def test_defaults_are_valid(tmp_path):
    empty = tmp_path / "empty.yaml"
    empty.write_text("")
    assert load(empty) == Config()


WRONG = {
    "train.stepz=3": "train.stepz: .*Did you mean: 'steps'",
    "train.steps=many": r"train.steps: Value 'many' .*\(give int\)",
    "train.steps=1.5": r"train.steps: .*\(give int\)",
    "train.steps=0": "train.steps = 0 must be at least 1",
    "attention.kind=sparse": "attention.kind: Invalid value 'sparse', expected one of",
    "attention.support=32": "attention.support = 32 must exceed attention.num_selected = 32",
    "attention.slope_ratio=0": "attention.slope_ratio = 0.0 must be above 0",
    "model.max_positions=0": "model.max_positions = 0 must be at least 1",
    "model.max_positions=8": "model.max_positions = 8 is less than data.sequence_length = 1024: raise it",
    "data.growth=512": "data.growth = '512' is not a list of lengths and steps: use none, or",
    "data.growth=500x10": "data.growth = '500x10': each length must divide data.sequence_length = 1024",
    "data.growth='0x10,8x1'": "data.growth = '0x10,8x1' is not a list",
    "data.growth=512x0": "data.growth = '512x0' is not a list",
    "data.growth='512x10,256x10'": "each length must exceed the one before, and data.sequence_length = 1024 all",
    "data.growth=1024x10": "each length must exceed the one before, and data.sequence_length = 1024 all",
    "data.growth='256x300,512x100'": "takes 400 steps, which leaves none of train.steps = 400 for contexts of",
    "data.growth=32x10": "data.growth = '32x10' over parallel.sequence_degree = 2 leaves shards of 16 tokens, shorter",
    "attention.window=0": "attention.window = 0 must be at least 1",
    "attention.num_selected=-1": "attention.num_selected = -1 must not be negative",
    "model.type=bert": "model.type: Invalid value 'bert'",
    "model.num_kv_heads=3": "model.num_kv_heads = 3 must divide model.num_query_heads = 4: use 1, 2 or 4",
    "model.head_dim=31": "model.head_dim = 31 must be even",
    "model.hidden_size=130": "model.hidden_size = 130 must be a multiple of model.num_query_heads = 4.*128 or 132",
    "parallel.sequence_degree=64": "leaves shards of 16 tokens, shorter than the window of 32.*degree of at most 32",
    "parallel.zero_stage=-1": "parallel.zero_stage = -1 must not be negative",
    "attention.backend=triton": "attention.backend = triton cannot run here",
    "parallel.zero_stage=4": "parallel.zero_stage = 4 is not a ZeRO stage: use 0, 1, 2 or 3",
    "parallel.deepspeed={bf16: {}}": "parallel.deepspeed.bf16 is derived from other settings or unknown",
    "parallel.deepspeed={comms_loger: {}}": "did you mean comms_logger?",
    "optimizer.learning_rate=nan": "optimizer.learning_rate = nan is not a finite number",
    "optimizer.learning_rate=-1": "optimizer.learning_rate = -1.0 must be above 0",
    "optimizer.scorer_rate=0": "optimizer.scorer_rate = 0.0 must be above 0",
    "optimizer.scorer_rate=inf": "optimizer.scorer_rate = inf is not a finite number",
    "data.held_out=1": "data.held_out = 1.0 must lie between 0 and 1",
    "run.name=../../x": "run.name = '../../x' is not a plain folder name",
    "data=7": "command line: ",
    "train.steps": "'train.steps' is not key=value",
}


@pytest.mark.parametrize(("override", "message"), WRONG.items(), ids=list(WRONG))
def test_each_wrong_setting_gets_its_own_message(override, message, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match=message):
        load(ROOT / "configs" / "quickstart.yaml", [override])


def test_one_kv_head_has_no_use_for_a_ratio_of_slopes():
    heads = ["model.num_query_heads=4", "model.num_kv_heads=1", "attention.slope=0.1", "attention.slope_ratio=0.5"]
    with pytest.raises(ConfigError, match=r"slope_ratio = 0.5 changes nothing with model.num_kv_heads = 1: set"):
        load(ROOT / "configs" / "quickstart.yaml", heads)


def test_a_ratio_of_slopes_needs_a_slope():
    quickstart = ROOT / "configs" / "quickstart.yaml"
    assert load(quickstart, ["attention.slope_ratio=0.1"]).attention.score_slope == 1 / 128
    with pytest.raises(ConfigError, match=r"slope_ratio = 0.1 changes nothing at attention.slope = 0: set .* above 0"):
        load(quickstart, ["attention.slope_ratio=0.1", "attention.slope=0"])


@pytest.mark.parametrize("idle", ["attention.kind=sink_window", "attention.kind=full", "attention.num_selected=0"])
def test_a_rate_for_scorers_needs_scorers_that_learn(idle):
    quickstart = ROOT / "configs" / "quickstart.yaml"
    assert load(quickstart, [idle, "optimizer.scorer_rate=1"]).optimizer.scorer_rate == 1
    with pytest.raises(ConfigError) as caught:
        load(quickstart, [idle, "optimizer.scorer_rate=10"])
    field, value = idle.split("=")
    told = f"optimizer.scorer_rate = 10.0 changes nothing with {field} = {value}, where no scorer learns: use 1"
    assert str(caught.value) == told
    # Contexts that are all visible teach scorers nothing.
    seen = ["data.sequence_length=64", "attention.num_selected=32", "attention.window=32", "optimizer.scorer_rate=10"]
    with pytest.raises(
        ConfigError, match=r"with data.sequence_length = 64, all of it visible \(k \+ w = 64\), where no"
    ):
        load(quickstart, seen)
    load(quickstart, [*seen, "attention.window=16"])
    # Whatever is tuned, scorers learn.
    for parameters in ("all", "scorer", "lora"):
        load(None, ["model.source=x", f"tune.parameters={parameters}", "optimizer.scorer_rate=10"])


def test_full_attention_shares_heads():
    quickstart = ROOT / "configs" / "quickstart.yaml"
    assert load(quickstart, ["attention.kind=full"]).parallel.sequence_degree == 2
    with pytest.raises(ConfigError, match=r"degree = 3 must divide model.num_kv_heads = 2 .*use 1 or 2, or another"):
        load(quickstart, ["attention.kind=full", "parallel.sequence_degree=3"])


def test_layers_that_stay_dense_share_heads():
    quickstart = ROOT / "configs" / "quickstart.yaml"
    assert load(quickstart, ["attention.full_layers=every_other"]).parallel.sequence_degree == 2
    told = r"degree = 3 must divide .* attention.full_layers = 1 shares .* use 1 or 2, or attention.full_layers=none"
    with pytest.raises(ConfigError, match=told):
        load(quickstart, ["attention.full_layers=1", "parallel.sequence_degree=3"])
    with pytest.raises(ConfigError, match="shorter than the window"):
        load(quickstart, ["attention.full_layers=1", "parallel.sequence_degree=2", "data.sequence_length=50"])


def test_several_mistakes_are_reported_together():
    with pytest.raises(ConfigError) as caught:
        load(ROOT / "configs" / "quickstart.yaml", ["train.steps=0", "attention.window=0"])
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(("size", "cure"), [(3, "start 2 or 4 processes"), (1, "start 2 processes")])
def test_world_size_must_divide(size, cure):
    with pytest.raises(ConfigError, match=f"must divide the number of processes, {size}: {cure}"):
        check_world_size(load(ROOT / "configs" / "quickstart.yaml"), size)


@pytest.mark.parametrize("text", ["run: [", "run:\n\tname: x", "run: {name: a, name: b}", "7"])
def test_broken_yaml_is_one_clear_error(tmp_path, text):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"broken\.yaml: "):
        load(path)


def test_a_missing_file_is_named():
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such configuration file"):
        load("nowhere.yaml")
