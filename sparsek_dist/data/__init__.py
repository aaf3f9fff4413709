"""From a corpus name to the batch a rank trains on: sources, corpus, store, packing, loader."""
