"""Pack variable-length sequences into fixed-shape batches for JAX and Flax.

    lengths -> histogram -> plan -> epoch -> bins -> batch -> model

Names are loaded when they are first used: importing this package loads neither jax, flax nor
grain, so planning starts as fast as NumPy does.  The device half is in `seqpack_jax.model`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seqpack_jax.errors import SeqpackError as SeqpackError
    from seqpack_jax.feeding.batch import FlatSequences as FlatSequences
    from seqpack_jax.feeding.batch import PackedBatch as PackedBatch
    from seqpack_jax.feeding.batch import pack_batch as pack_batch
    from seqpack_jax.feeding.batch import unpack_batch as unpack_batch
    from seqpack_jax.feeding.epoch import Epoch as Epoch
    from seqpack_jax.feeding.epoch import materialize_epoch as materialize_epoch
    from seqpack_jax.feeding.pipeline import PackedSource as PackedSource
    from seqpack_jax.feeding.pipeline import PackOperation as PackOperation
    from seqpack_jax.feeding.pipeline import pack_dataset as pack_dataset
    from seqpack_jax.model.segments import (
        build_packing_attention_bias as build_packing_attention_bias,
    )
    from seqpack_jax.model.segments import build_packing_cu_seqlens as build_packing_cu_seqlens
    from seqpack_jax.model.segments import from_seed_ids as from_seed_ids
    from seqpack_jax.permutation import inverse_permute as inverse_permute
    from seqpack_jax.permutation import permute as permute
    from seqpack_jax.permutation import seed_from_components as seed_from_components
    from seqpack_jax.planning.bounds import volume_bound as volume_bound
    from seqpack_jax.planning.histogram import Pieces as Pieces
    from seqpack_jax.planning.histogram import SequencePools as SequencePools
    from seqpack_jax.planning.histogram import (
        length_histogram_from_lengths as length_histogram_from_lengths,
    )
    from seqpack_jax.planning.packers import greedy_pack_sequences as greedy_pack_sequences
    from seqpack_jax.planning.packers import heap_pack_sequences as heap_pack_sequences
    from seqpack_jax.planning.packers import pack_length_histogram as pack_length_histogram
    from seqpack_jax.planning.packers import (
        pack_length_histogram_batched as pack_length_histogram_batched,
    )
    from seqpack_jax.planning.packers import pack_sequences as pack_sequences
    from seqpack_jax.planning.plan import Bins as Bins
    from seqpack_jax.planning.plan import Certificate as Certificate
    from seqpack_jax.planning.plan import PackingPlan as PackingPlan
    from seqpack_jax.planning.stats import PackingStats as PackingStats

__version__ = "0.1.0"

# Where each name lives; a test compares this with the imports above.
_HOMES = {
    "errors": ["SeqpackError"],
    "permutation": ["inverse_permute", "permute", "seed_from_components"],
    "planning.bounds": ["volume_bound"],
    "planning.histogram": ["Pieces", "SequencePools", "length_histogram_from_lengths"],
    "planning.packers": [
        "greedy_pack_sequences",
        "heap_pack_sequences",
        "pack_length_histogram",
        "pack_length_histogram_batched",
        "pack_sequences",
    ],
    "planning.plan": ["Bins", "Certificate", "PackingPlan"],
    "planning.stats": ["PackingStats"],
    "feeding.batch": ["FlatSequences", "PackedBatch", "pack_batch", "unpack_batch"],
    "feeding.epoch": ["Epoch", "materialize_epoch"],
    "feeding.pipeline": ["PackOperation", "PackedSource", "pack_dataset"],
    "model.segments": [
        "build_packing_attention_bias",
        "build_packing_cu_seqlens",
        "from_seed_ids",
    ],
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name in ("planning", "feeding", "model"):
        return importlib.import_module(f"seqpack_jax.{name}")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'seqpack_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"seqpack_jax.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
