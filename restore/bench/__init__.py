"""Benchmark runs: configuration, data sets, batches, workers, results; the cost of a step."""
