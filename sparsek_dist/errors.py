"""What can go wrong, one class per exit code, so that launchers and schedulers can tell the cases apart."""

from __future__ import annotations


class SparsekError(Exception):
    """Base of every error a user can cause or cure. Printed as one line, without a traceback."""

    exit_code = 1


class ConfigError(SparsekError, ValueError):
    """A setting that cannot work: the message names the field, its value and the cure."""

    exit_code = 2


class DataError(SparsekError):
    """A corpus that cannot be read or holds nothing to train on: for the user, a `data.path` that cannot work."""

    exit_code = 2


class CheckpointError(SparsekError):
    """A checkpoint that is missing, incomplete, altered, or made by a different run."""

    exit_code = 4


class NumericsError(SparsekError):
    """NaN or infinity where a finite number must stand."""

    exit_code = 5


class PeerError(SparsekError):
    """Another rank is missing, silent, or disagrees with this one."""

    exit_code = 6
