"""Paged attention: the work list, and what computes it."""
