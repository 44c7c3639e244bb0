"""Strict JAX settings and the hypothesis profile of the whole suite."""

import gc

import jax
import pytest
from absl import flags
from hypothesis import settings

# Grain's worker processes read absl flags as soon as jax is importable (google/grain#1355).
flags.FLAGS.mark_as_parsed()

# For tests of shard_map and of sharded arrays; all else runs on the first.
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

settings.register_profile("seqpack", deadline=None, derandomize=True, max_examples=100)
settings.load_profile("seqpack")


@pytest.fixture
def collect_at_the_end():
    """Free the semaphores of dropped workers here, not whenever the collector happens to run.

    CPython 3.13 complains when it frees one while it registers another ("ReentrantCallError").
    """
    gc.disable()
    yield
    gc.enable()
    gc.collect()
