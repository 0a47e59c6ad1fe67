"""Experiments that are not bags of a store: their examples, and how any task is trained on them."""
