"""From YAML and `key=value` to a checked configuration, and back to YAML. The only importer of omegaconf.

Two questions, two functions: `load` (is each value of the right type and range, and do they fit each other?), `to_yaml`
(what exactly was run?). Whether some number of processes can run it: `relations.check_world_size`. None of them touches
a disk beyond the YAML file, a network, a process group or a GPU, and none changes a value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from sparsek_dist import relations
from sparsek_dist.config import AttentionConfig, Config, flatten
from sparsek_dist.errors import ConfigError


def load(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Defaults, then the YAML file if any, then `key=value` in dotted form; all relations checked.

    Raises:
        ConfigError: naming the field, its value and the cure; several mistakes are listed one a line.
    """
    tree = OmegaConf.structured(Config)
    if path is not None:
        if not Path(path).is_file():
            raise ConfigError(f"{path}: no such configuration file (configs/ holds those of sparsek-dist)")
        with _explained(str(path)):
            tree = OmegaConf.merge(tree, OmegaConf.load(path))
    _check_dotlist(overrides)
    with _explained("command line"):
        return _checked(OmegaConf.merge(tree, OmegaConf.from_dotlist(list(overrides))))


def from_yaml(text: str) -> Config:
    """The configuration that `to_yaml` wrote."""
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(text)))
    assert isinstance(config, Config)
    return config


def attention_from(settings: Mapping[str, Any], *, source: str) -> AttentionConfig:
    """Settings of the attention alone, from sparsify() or a model's config.json. ConfigError: begins with `source`."""
    with _explained(source):
        return _checked(OmegaConf.merge(OmegaConf.structured(Config), {"attention": dict(settings)})).attention


def to_yaml(config: Config) -> str:
    """Every setting with its value, as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


@contextmanager
def _explained(source: str) -> Iterator[None]:
    try:
        yield
    except (OmegaConfBaseException, YAMLError, ValueError, OSError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{source}: {_explain(error)}") from error


def _checked(tree: Any) -> Config:
    config = OmegaConf.to_object(tree)
    assert isinstance(config, Config)
    problems = relations.problems(config, flatten(config))
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def _check_dotlist(overrides: Sequence[str]) -> None:
    for override in overrides:
        if "=" not in override or override.startswith("-"):
            raise ConfigError(f"command line: {override!r} is not key=value: for instance train.steps=200")


def _explain(error: Exception) -> str:
    """omegaconf's or YAML's message on one line, led by the full key and ended by what would do."""
    key = getattr(error, "full_key", None)
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if line and not line.startswith(("full_key:", "object_type=", "reference_type="))]
    return f"{key}: {' '.join(told)} ({_cure(key)})" if key else " ".join(told)


def _cure(key: str) -> str:
    """What a dotted key takes, or, where there is no such key, which keys there are."""
    section: Any = Config
    for name in key.split("."):
        known = {entry.name: entry for entry in fields(section)}
        if name not in known:
            return "keys here: " + ", ".join(known)
        if not is_dataclass(known[name].default_factory):
            return f"give {known[name].type}"
        section = known[name].default_factory
    return "keys here: " + ", ".join(entry.name for entry in fields(section))
