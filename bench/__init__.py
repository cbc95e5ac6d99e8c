"""Benchmarks of a checkout, run from its root: python -m bench.run, bench.gpu, bench.layers. Not part of the package."""
