"""Meshes, and where on them parameters lie."""
