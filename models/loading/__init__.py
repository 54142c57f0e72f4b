"""From a model's name to parameters on the devices: Hugging Face folders, GGUF files and Orbax checkpoints."""
