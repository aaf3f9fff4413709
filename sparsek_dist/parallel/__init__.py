"""Who holds what, and how it travels: the mesh of ranks, the layout of shards, the collectives, the loss."""
