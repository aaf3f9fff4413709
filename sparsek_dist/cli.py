"""The command line: `sparsek train | eval | generate | sparsify | export | plan | doctor`.

One line per error, and an exit code that tells its kind. Sub-commands are imported when they run, so that a mistyped
command is told at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sparsek_dist.errors import ConfigError, NumericsError, PeerError, SparsekError
from sparsek_dist.settings import load

logger = logging.getLogger(__name__)

LOST_PEER = re.compile(r"gloo|NCCL|Connection (closed|reset)|Broken pipe|Timed out waiting", re.IGNORECASE)
"""In the messages of torch.distributed, which raises plain RuntimeErrors for most of what happens to other ranks."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code; see errors.py."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    # Names that torch has renamed; the new ones are missing in versions that are supported.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # DeepSpeed warns at its import that it runs on the CPU; environment.json says so, too.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
    try:
        code = options.run(options)
    except (SparsekError, RuntimeError) as error:
        known = _known(error, options.command)
        if known is None or options.debug:
            raise
        _report(known)
        return known.exit_code
    except KeyboardInterrupt:
        return 130
    return code or 0


def build_parser() -> argparse.ArgumentParser:
    """All sub-commands with their options."""
    parser = argparse.ArgumentParser(prog="sparsek", description="Train long-context language models with SPARSEK.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")

    train = commands.add_parser("train", help="train a model, or continue to", description="Trains a model.")
    _add_config(train)
    train.set_defaults(run=_train)

    plan = commands.add_parser("plan", help="show what a configuration would do", description="Starts nothing.")
    _add_config(plan)
    plan.add_argument("--world-size", type=int, help="processes (default: one sequence-parallel group)")
    plan.set_defaults(run=_plan)

    evaluate = commands.add_parser("eval", help="measure a trained run or a converted model; on all processes started")
    _add_evaluation(evaluate)
    evaluate.set_defaults(run=_evaluate)

    generate = commands.add_parser("generate", help="continue a text with a trained run or a converted model")
    generate.add_argument("model", metavar="MODEL", help="folder of a run or of a converted model, or a hub id")
    generate.add_argument("--prompt", default="", help="text to continue")
    generate.add_argument("--max-new-tokens", type=int, default=200, help="length of the continuation (200)")
    generate.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (0.8)")
    generate.add_argument("--seed", type=int, default=0, help="of the draws (0)")
    generate.add_argument("--show-kept", action="store_true", help="highlight what is kept of the prompt")
    generate.add_argument("--kept-page", metavar="FILE", type=Path, help="write that as a web page")
    generate.set_defaults(run=_generate)

    doctor = commands.add_parser("doctor", help="check hosts, GPUs and links; start it as you would start train")
    doctor.add_argument("--folder", type=Path, default=Path("runs"), help="where runs will go, run.root (runs)")
    doctor.add_argument("--timeout", type=float, default=20.0, help="seconds to wait for other ranks, per step (20)")
    doctor.set_defaults(run=_doctor)

    sparsify = commands.add_parser("sparsify", help="give a pretrained model SPARSEK attention")
    sparsify.add_argument("model", metavar="MODEL", help="folder or hub id of a dense transformers model")
    sparsify.add_argument("--seed", type=int, default=0, help="of the new scorers (0)")
    sparsify.add_argument("--no-attention-dropout", action="store_true", help="set the model's to 0 (GPT-2 has 0.1)")
    sparsify.add_argument("--distill", metavar="TEXT", type=Path, help="fit the scorers to what it attends to here")
    sparsify.add_argument(
        "--distill-length", metavar="N", type=int, help="tokens of its contexts; default: 1024 or 4 windows"
    )
    sparsify.add_argument("overrides", metavar="attention.key=value", nargs="*", help="the attention it gets")
    sparsify.set_defaults(run=_sparsify)

    export = commands.add_parser("export", help="write a run's newest checkpoint as a Hugging Face folder")
    export.add_argument("folder", metavar="RUN", type=Path, help="folder of the run")
    export.set_defaults(run=_export)
    for command in (sparsify, export):
        command.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder to write: new, or empty")
        command.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of the weights")

    for command in (train, plan, evaluate, generate, sparsify, export, doctor):
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _add_config(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", metavar="CONFIG", help="YAML file with settings")
    command.add_argument("overrides", metavar="key=value", nargs="*", help="settings that go before the file's")


def _add_evaluation(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", metavar="RUN_OR_FOLDER", type=Path, help="folder of a run, or of a model")
    command.add_argument("--task", choices=("perplexity", "passkey", "needles", "chain"), default="perplexity")
    command.add_argument("--data", metavar="PATH", help="text, as data.path (default: what the run has held out)")
    command.add_argument("--max-sequences", type=int, default=0, help="contexts to use (default: all)")
    command.add_argument("--length", type=int, help="tokens of a context (default: the run's, or 2048 at most)")
    command.add_argument("--lengths", type=_numbers(int), default=[512, 1024], help="of the other tasks (512,1024)")
    command.add_argument("--depths", type=_numbers(float), default=[0, 0.25, 0.5, 0.75, 1], help="of the needle")
    command.add_argument("--samples", type=int, default=4, help="per length and depth (4)")
    command.add_argument(
        "--needles", type=int, default=4, help="in one text, of which one is asked for; links of a chain (4)"
    )
    command.add_argument("--seed", type=int, default=0, help="of the other tasks (0)")
    command.add_argument("--out", metavar="DIR", type=Path, help="where results go (default: RUN_OR_FOLDER)")


def _numbers(kind: type) -> Callable[[str], list[Any]]:
    """For argparse: `512,1024` -> [512, 1024]."""

    def numbers(words: str) -> list[Any]:
        return [kind(word) for word in words.split(",")]

    return numbers


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """argparse stops taking overrides at the first option; those after it are handed over here."""
    parser = build_parser()
    options, rest = parser.parse_known_args(_without_local_rank(arguments))
    wrong = [word for word in rest if word.startswith("-") or not hasattr(options, "overrides")]
    if wrong:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _without_local_rank(arguments: Sequence[str]) -> list[str]:
    """Drops `--local_rank=N`, which deepspeed's launcher puts first; the environment says the same."""
    return [word for word in arguments if not re.fullmatch(r"--local[_-]rank=\d+", word)]


def _train(options: argparse.Namespace) -> None:
    config = load(options.config, options.overrides)
    from sparsek_dist.commands.train import train

    train(config)


def _plan(options: argparse.Namespace) -> None:
    config = load(options.config, options.overrides)
    if options.world_size is not None and options.world_size < 1:
        raise ConfigError(f"--world-size = {options.world_size} must be at least 1")
    import torch

    from sparsek_dist.commands.plan import plan

    plan(config, options.world_size, on_gpu=torch.cuda.is_available())


def _evaluate(options: argparse.Namespace) -> None:
    if options.max_sequences < 0:
        raise ConfigError(f"--max-sequences = {options.max_sequences} must not be negative: 0 uses all")
    if options.length is not None and options.length < 2:
        raise ConfigError(f"--length = {options.length} must be at least 2 tokens")
    from sparsek_dist.commands import evaluate
    from sparsek_dist.commands.evaluation_target import open_target

    target = open_target(options.folder, data=options.data, length=options.length, out=options.out)
    if options.task == "perplexity":
        evaluate.evaluate_text(target, max_sequences=options.max_sequences)
        return
    evaluate.evaluate_retrieval(
        target,
        options.task,
        lengths=options.lengths,
        depths=options.depths,
        samples=options.samples,
        needles=options.needles,
        seed=options.seed,
    )


def _generate(options: argparse.Namespace) -> None:
    from sparsek_dist.commands.generate import generate_text

    generate_text(
        options.model,
        options.prompt,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seed=options.seed,
        show_kept=options.show_kept,
        kept_page=options.kept_page,
    )


def _doctor(options: argparse.Namespace) -> int:
    if not options.timeout > 0:
        raise ConfigError(f"--timeout = {options.timeout} must be more than 0 seconds")
    from sparsek_dist.commands.doctor import doctor

    return doctor(options.folder, timeout=options.timeout)


def _sparsify(options: argparse.Namespace) -> None:
    from sparsek_dist.commands.sparsify import sparsify_folder

    sparsify_folder(
        options.model,
        options.out,
        options.overrides,
        seed=options.seed,
        attention_dropout_off=options.no_attention_dropout,
        dtype=options.dtype,
        distill=options.distill,
        distill_length=options.distill_length,
    )


def _export(options: argparse.Namespace) -> None:
    from sparsek_dist.commands.export import export_run

    export_run(options.folder, options.out, dtype=options.dtype)


LESS_MEMORY = {
    "train": "lower train.micro_batch_size, set train.activation_checkpointing=true, or raise parallel.sequence_degree",
    "eval": "take shorter contexts (--length, --lengths), or start it on several GPUs, which share each context",
    "generate": "take a shorter prompt, or a larger GPU",
}
"""What a user can do about a full GPU, by command."""


def _known(error: Exception, command: str) -> SparsekError | None:
    """The error as one a user can cure; None if it is a mistake of ours, which keeps its traceback."""
    if isinstance(error, SparsekError):
        return error
    import torch

    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    if isinstance(error, torch.OutOfMemoryError):
        return SparsekError(f"out of GPU memory ({first}): {LESS_MEMORY.get(command, 'take a larger GPU')}")
    if isinstance(error, torch.distributed.DistError) or LOST_PEER.search(str(error)):
        return PeerError(
            f"lost contact with another rank ({first}): its own message, or the logs/ of the run folder, say why it "
            "ended; start the same command again to continue (training does from its newest checkpoint)"
        )
    return None


def _report(error: SparsekError) -> None:
    """One message on stderr: from rank 0 where all ranks see the same, from each where one alone may have seen it."""
    rank = int(os.environ.get("RANK", os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK", "0"))))
    if rank == 0:
        print(f"error: {error}", file=sys.stderr)
    elif isinstance(error, PeerError | NumericsError):
        print(f"rank {rank}: {error}", file=sys.stderr)
