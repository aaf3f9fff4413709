"""`sparsek plan`: what a configuration would do on so many processes. Starts nothing, reads no data, needs no GPU."""

from __future__ import annotations

import json

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sparsek_dist.attention.exchange import received_per_layer
from sparsek_dist.attention.parallel import budget_of
from sparsek_dist.config import Config
from sparsek_dist.models.build import count_parameters, with_shape
from sparsek_dist.models.tokenizer import load_tokenizer
from sparsek_dist.relations import check_world_size
from sparsek_dist.training.engine import Precision, deepspeed_config, resolve_precision

BYTES_OF = {"float32": 4, "bfloat16": 2}
POSITION_BYTES = 4


def plan(config: Config, world_size: int | None, *, on_gpu: bool) -> None:
    """Prints mesh, batch arithmetic, parameters, shapes per rank, exchanged bytes and DeepSpeed's settings.

    Args:
        config: the run.
        world_size: processes; one sequence-parallel group if None.
        on_gpu: what `train.precision=auto` stands for.

    Raises:
        ConfigError: if so many processes cannot run it.
    """
    size = config.parallel.sequence_degree if world_size is None else world_size
    check_world_size(config, size)
    precision = resolve_precision(config, on_gpu=on_gpu)
    settings = deepspeed_config(config, size, precision=precision)
    vocab_size = len(load_tokenizer(config.data.tokenizer))
    parameters = count_parameters(config, vocab_size=vocab_size)
    config = with_shape(config, vocab_size=vocab_size)
    console = Console(highlight=False)
    for title, rows in (
        ("processes", _mesh_rows(config, size)),
        ("one optimizer step", _batch_rows(config, size)),
        ("model", _model_rows(config, parameters, vocab_size, precision)),
        ("on one rank, per layer", _shape_rows(config, precision)),
    ):
        table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2))
        for name, value in rows:
            table.add_row(escape(name), escape(value))
        console.print(table, "")
    console.print("[bold italic]DeepSpeed's settings")
    console.print_json(json.dumps(settings))


def _mesh_rows(config: Config, size: int) -> list[tuple[str, str]]:
    degree = config.parallel.sequence_degree
    return [
        ("processes", f"{size} = {config.data_parallel_degree(size)} data parallel x {degree} sequence parallel"),
        ("sharing a sequence", f"ranks 0 to {degree - 1}, and so on" if degree > 1 else "none"),
        ("ZeRO stage", str(config.parallel.zero_stage)),
    ]


def _batch_rows(config: Config, size: int) -> list[tuple[str, str]]:
    sequences = config.sequences_per_step(size)
    train, data = config.train, config.data
    product = f"{config.data_parallel_degree(size)} x {train.micro_batch_size} x {train.accumulation_steps}"
    growing = [f"{length:,} tokens for {steps} steps" for length, steps in data.first_lengths]
    return [
        *([("contexts grow", ", ".join([*growing, f"then {data.sequence_length:,}"]))] if growing else []),
        ("contexts", f"{sequences} = {product} (data parallel x micro batch x accumulation)"),
        ("tokens", f"{sequences * data.sequence_length:,} = {sequences} x {data.sequence_length:,}"),
        ("whole run", f"{train.steps:,} steps, {train.steps * sequences * data.sequence_length:,} tokens"),
    ]


def _model_rows(config: Config, parameters: int, vocab_size: int, precision: Precision) -> list[tuple[str, str]]:
    attention = config.attention
    kind = f"{attention.kind}, all pairs"
    if attention.kind != "full":
        kind = f"{attention.kind}, {attention.num_selected} + {attention.window} pairs per query"
    if attention.kind == "sparsek":
        kind += f", gate {attention.gate}, slope {attention.score_slope:.2g} a token"
    return [
        ("parameters", f"{parameters:,} that learn, in {precision}"),
        ("vocabulary", f"{vocab_size:,} ({config.data.tokenizer})"),
        ("layers", str(config.model.num_layers)),
        ("attention", kind),
    ]


def _shape_rows(config: Config, precision: Precision) -> list[tuple[str, str]]:
    model, batch, shard = config.model, config.train.micro_batch_size, config.shard_length
    rows = [
        ("hidden [b, s, e]", f"[{batch}, {shard}, {model.hidden_size}]"),
        ("queries [b, s, h, d]", f"[{batch}, {shard}, {model.num_query_heads}, {model.head_dim}]"),
        ("keys, values [b, s, g, d]", f"[{batch}, {shard}, {model.num_kv_heads}, {model.head_dim}]"),
    ]
    if config.attention.kind == "full":
        return rows
    budget = budget_of(config.attention)
    received = batch * received_per_layer(
        config.parallel.sequence_degree,
        window=budget.window,
        num_selected=budget.num_selected,
        support=budget.support,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        pair_bytes=BYTES_OF[precision],
        exchange=config.parallel.exchange,
    )
    rows.append(("received, forward", f"{received:,} bytes, whatever the sequence length"))
    if config.attention.full_layers != "none" and config.parallel.sequence_degree > 1:
        rows.append(("... in a dense layer", f"{_dense_bytes(config, BYTES_OF[precision]):,} bytes"))
    return rows


def _dense_bytes(config: Config, number_bytes: int) -> int:
    """What a rank receives in one forward pass of a layer that stays dense: DeepSpeed-Ulysses, and the positions."""
    model, degree = config.model, config.parallel.sequence_degree
    tokens = config.train.micro_batch_size * config.shard_length * (degree - 1)
    width = 2 * (model.num_query_heads + model.num_kv_heads) * model.head_dim
    return tokens * width * number_bytes // degree + tokens * POSITION_BYTES
