"""One training loop for operators, grown models and models from scratch; no word of growth."""
