"""One training loop for operators, grown models and models from scratch; it knows nothing of growth."""
