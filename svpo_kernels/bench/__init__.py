"""`svpo bench`: the benchmark suite, as installed. One family of races a file; benchmarks/ runs the same under pytest.

Every race first checks its answers, values and gradients, and reports medians of interleaved runs, spread, peak memory
and the share of the floor that this machine's own copy and product rates, measured in the same run, leave.
"""
