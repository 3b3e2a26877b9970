"""One training loop for operators, grown models and models from nothing; no word of growth."""
