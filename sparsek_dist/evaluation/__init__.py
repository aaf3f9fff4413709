"""How good a model is, and how good it must be to beat models that need no training."""
