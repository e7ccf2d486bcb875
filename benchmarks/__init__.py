"""Measurements: ``python -m benchmarks``, from the root of the checkout."""
