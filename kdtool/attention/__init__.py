"""Attention operators: exact softmax attention and what comes near it in less than quadratic time."""
