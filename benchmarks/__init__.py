"""Speed, as ratios in one interleaved run: python -m benchmarks --help."""
