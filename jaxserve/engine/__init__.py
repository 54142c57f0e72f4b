"""The engine: scheduling, packed batches, compiled steps, outputs."""
