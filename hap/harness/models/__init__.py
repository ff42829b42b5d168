"""Pruned models on disk and back, without a pickle."""
