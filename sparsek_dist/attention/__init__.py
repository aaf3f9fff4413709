"""SPARSEK attention across ranks: what scores a pair, what travels between shards, what each shard computes."""
