"""sparsek-dist: training language models on very long contexts, with an exchange between ranks that does not grow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsek_dist.models.pretrained import load_pretrained, sparsify

__version__ = "0.1.0"
__all__ = ["__version__", "load_pretrained", "sparsify"]


def __getattr__(name: str) -> Any:
    """Imported when asked for: the command line must not wait for torch to refuse a mistyped word."""
    if name in ("load_pretrained", "sparsify"):
        from sparsek_dist.models import pretrained

        return getattr(pretrained, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
