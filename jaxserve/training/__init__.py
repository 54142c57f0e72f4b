"""What is trained for a model that is served."""
