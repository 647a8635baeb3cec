"""The races of svpo_kernels.bench, under the name that the benchmarks here know them by."""

from svpo_kernels.bench.race import Clock, Result, check_same, error_against, gradients, peak_memory, race, weigh

__all__ = ["Clock", "Result", "check_same", "error_against", "gradients", "peak_memory", "race", "weigh"]
