"""Feeding (NumPy, Grain): plans become batches."""
