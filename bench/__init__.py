"""Measurements of the kernels against what a user could take instead. `python -m bench.report` runs them all;
bench/ops/ holds them for pytest-benchmark. Sizes stand in sizes.toml."""
