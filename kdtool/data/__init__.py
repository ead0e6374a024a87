"""Data: where rows come from, what their columns mean, how they become batches."""
