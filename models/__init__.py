"""Model families in Flax NNX, and the loading of their weights."""
