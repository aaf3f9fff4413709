"""transformers models with SPARSEK attention: built, adapted, observed, exported. No model code of our own."""

from sparsek_dist.models.build import build_model, count_parameters

__all__ = ["build_model", "count_parameters"]
