"""Serving on hardware that is not there: device and cost models, and the real scheduler on a virtual clock. No jax."""
