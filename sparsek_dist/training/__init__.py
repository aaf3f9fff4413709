"""One training run: the engine (DeepSpeed), the loop, checkpoints, and what a run writes down about itself."""
