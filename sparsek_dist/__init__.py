"""sparsek-dist: training language models on very long contexts, with an exchange between ranks that does not grow."""

__version__ = "0.1.0"
