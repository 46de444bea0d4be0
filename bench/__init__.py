"""Benchmarks of rfkernels: `python -m bench --help`. How the figures are taken is told in README.md."""
