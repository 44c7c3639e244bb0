"""The model half (JAX, Flax): batches become masks, offsets and losses."""
