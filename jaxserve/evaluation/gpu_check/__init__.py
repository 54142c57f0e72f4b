"""What to do with a GPU that is at hand for minutes: the stages of scripts/gpu_check.py, and the report of them."""
