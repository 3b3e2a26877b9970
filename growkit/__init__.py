"""Grow small pretrained transformers into larger ones and take them into serving."""

__version__ = "0.1.0"
