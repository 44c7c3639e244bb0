"""Planning (NumPy): which lengths share a bin."""
