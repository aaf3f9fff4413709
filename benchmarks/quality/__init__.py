"""Is SPARSEK worth its scores? Small models trained from scratch at equal budget, and dense ones converted.

    python -m benchmarks.quality --scale cpu --out quality

`scales` says how large, `cells` what is compared, `recall` and `text` make the data, `run` trains and measures one
cell, `report` lays the cells side by side. Nothing is downloaded.
"""
