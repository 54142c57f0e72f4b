"""Quantised checkpoints: a file for each format, which ends here: everything else sees ordinary tensors."""
