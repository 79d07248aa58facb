"""What the benchmarks share: contenders, times, rows of results, and checks in processes apart."""
