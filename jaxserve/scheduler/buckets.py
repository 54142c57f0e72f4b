"""Token buckets: the sizes of step that programs are compiled for."""

from __future__ import annotations

from collections.abc import Sequence

SMALLEST_BUCKET = 16
"""A step of very few rows is slower than this one on CPUs: XLA gives it a matrix-vector kernel."""
TILE = 128
"""Rows of a GPU's matmul tile: larger buckets are multiples of it (arXiv 2403.02310, section 4.3)."""


def token_buckets(token_budget: int) -> tuple[int, ...]:
    """Step sizes in tokens: powers of two up to 128, multiples of 128 above, and the budget itself.

    Above 1024 they grow by an eighth at a time, so that a large budget does not mean dozens of programs.
    """
    buckets, size = [], SMALLEST_BUCKET
    while size < token_budget:
        buckets.append(size)
        step = size if size < TILE else max(TILE, size // 8 // TILE * TILE)
        size += step
    return (*buckets, token_budget)


def bucket_of(num_tokens: int, buckets: Sequence[int]) -> int:
    """Rows of the smallest program that holds ``num_tokens``, which the largest one does."""
    return next(rows for rows in buckets if rows >= num_tokens)


def bubble_share(stage_tokens: Sequence[int], num_rows: int) -> float:
    """Share of a tick's rows that hold no token: every stage of a pipeline computes ``num_rows``, the bucket of the
    largest batch, for the tokens of its own batch.
    """
    return 1 - sum(stage_tokens) / (len(stage_tokens) * num_rows)
