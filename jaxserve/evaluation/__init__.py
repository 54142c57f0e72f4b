"""Benchmarks: workloads, and what an engine makes of them."""
