"""Text that arrives in parts."""

from __future__ import annotations


def overlap(text: str, word: str) -> int:
    """Length of the longest end of ``text`` that begins ``word`` without being all of it."""
    longest = min(len(text), len(word) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(word[:n])), 0)
