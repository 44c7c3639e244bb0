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
    from seqpack_jax.feeding.batch import PackedBatch as PackedBatch
    from seqpack_jax.feeding.batch import pack_batch as pack_batch
    from seqpack_jax.feeding.batch import unpack_batch as unpack_batch
    from seqpack_jax.feeding.batch import unpack_by_id as unpack_by_id
    from seqpack_jax.feeding.batch import validate_batch as validate_batch
    from seqpack_jax.feeding.distributed import ray_map as ray_map
    from seqpack_jax.feeding.epoch import Epoch as Epoch
    from seqpack_jax.feeding.epoch import EpochShard as EpochShard
    from seqpack_jax.feeding.epoch import materialize_epoch as materialize_epoch
    from seqpack_jax.feeding.epoch import shuffle_bins as shuffle_bins
    from seqpack_jax.feeding.export import export_rows as export_rows
    from seqpack_jax.feeding.formats import Columns as Columns
    from seqpack_jax.feeding.grain_packers import BestFitPackIterDataset as BestFitPackIterDataset
    from seqpack_jax.feeding.grain_packers import FirstFitPackIterDataset as FirstFitPackIterDataset
    from seqpack_jax.feeding.hosts import check_processes as check_processes
    from seqpack_jax.feeding.hosts import make_global_batch as make_global_batch
    from seqpack_jax.feeding.hosts import row_shard as row_shard
    from seqpack_jax.feeding.inputs import list_shards as list_shards
    from seqpack_jax.feeding.manifest import PreparationParameters as PreparationParameters
    from seqpack_jax.feeding.measuring import measure_lengths as measure_lengths
    from seqpack_jax.feeding.operation import PackOperation as PackOperation
    from seqpack_jax.feeding.packed_source import PackedSource as PackedSource
    from seqpack_jax.feeding.pipeline import pack_dataset as pack_dataset
    from seqpack_jax.feeding.preparation import merge_shards as merge_shards
    from seqpack_jax.feeding.preparation import prepare as prepare
    from seqpack_jax.feeding.prepared import Prepared as Prepared
    from seqpack_jax.feeding.prepared import load_prepared as load_prepared
    from seqpack_jax.feeding.resuming import PackedDataset as PackedDataset
    from seqpack_jax.feeding.row_files import decode_row as decode_row
    from seqpack_jax.feeding.sequences import FlatSequences as FlatSequences
    from seqpack_jax.feeding.shards import prepare_shard as prepare_shard
    from seqpack_jax.feeding.stream_dataset import PackIterDataset as PackIterDataset
    from seqpack_jax.feeding.tables import open_table as open_table
    from seqpack_jax.feeding.token_files import open_flat as open_flat
    from seqpack_jax.feeding.token_files import open_megatron as open_megatron
    from seqpack_jax.feeding.token_store import open_sequences as open_sequences
    from seqpack_jax.feeding.token_store import write_flat as write_flat
    from seqpack_jax.feeding.upstream import JoinedSequences as JoinedSequences
    from seqpack_jax.feeding.upstream import RecordSequences as RecordSequences
    from seqpack_jax.feeding.verification import verify_prepared as verify_prepared
    from seqpack_jax.feeding.workers import local_map as local_map
    from seqpack_jax.model.segments import (
        build_packing_attention_bias as build_packing_attention_bias,
    )
    from seqpack_jax.model.segments import build_packing_cu_seqlens as build_packing_cu_seqlens
    from seqpack_jax.model.segments import from_seed_ids as from_seed_ids
    from seqpack_jax.permutation import inverse_permute as inverse_permute
    from seqpack_jax.permutation import permute as permute
    from seqpack_jax.permutation import seed_from_components as seed_from_components
    from seqpack_jax.planning.bins import Bins as Bins
    from seqpack_jax.planning.bounds import Bound as Bound
    from seqpack_jax.planning.bounds import lower_bound as lower_bound
    from seqpack_jax.planning.bounds import volume_bound as volume_bound
    from seqpack_jax.planning.changeover import StepFigures as StepFigures
    from seqpack_jax.planning.changeover import SuggestedRows as SuggestedRows
    from seqpack_jax.planning.changeover import suggest_rows as suggest_rows
    from seqpack_jax.planning.histogram import SequencePools as SequencePools
    from seqpack_jax.planning.histogram import (
        length_histogram_from_lengths as length_histogram_from_lengths,
    )
    from seqpack_jax.planning.over_length import OverLength as OverLength
    from seqpack_jax.planning.over_length import OverLengthReport as OverLengthReport
    from seqpack_jax.planning.over_length import Pieces as Pieces
    from seqpack_jax.planning.packers import greedy_pack_sequences as greedy_pack_sequences
    from seqpack_jax.planning.packers import heap_pack_sequences as heap_pack_sequences
    from seqpack_jax.planning.packers import pack_length_histogram as pack_length_histogram
    from seqpack_jax.planning.packers import (
        pack_length_histogram_batched as pack_length_histogram_batched,
    )
    from seqpack_jax.planning.packers import pack_sequences as pack_sequences
    from seqpack_jax.planning.packers import sort_indices_by_length as sort_indices_by_length
    from seqpack_jax.planning.plan import Certificate as Certificate
    from seqpack_jax.planning.plan import PackingPlan as PackingPlan
    from seqpack_jax.planning.stats import PackingStats as PackingStats
    from seqpack_jax.planning.vectors import VectorPlan as VectorPlan
    from seqpack_jax.planning.vectors import pack_vectors as pack_vectors

__version__ = "0.1.0"

# Where each name lives; a test compares this with the imports above.
_HOMES = {
    "errors": ["SeqpackError"],
    "permutation": ["inverse_permute", "permute", "seed_from_components"],
    "planning.over_length": ["OverLength", "OverLengthReport", "Pieces"],
    "planning.histogram": ["SequencePools", "length_histogram_from_lengths"],
    "planning.bins": ["Bins"],
    "planning.plan": ["Certificate", "PackingPlan"],
    "planning.bounds": ["Bound", "lower_bound", "volume_bound"],
    "planning.vectors": ["VectorPlan", "pack_vectors"],
    "planning.stats": ["PackingStats"],
    "planning.changeover": ["StepFigures", "SuggestedRows", "suggest_rows"],
    "planning.packers": [
        "greedy_pack_sequences",
        "heap_pack_sequences",
        "pack_length_histogram",
        "pack_length_histogram_batched",
        "pack_sequences",
        "sort_indices_by_length",
    ],
    "feeding.epoch": ["Epoch", "EpochShard", "materialize_epoch", "shuffle_bins"],
    "feeding.sequences": ["FlatSequences"],
    "feeding.batch": [
        "PackedBatch",
        "pack_batch",
        "unpack_batch",
        "unpack_by_id",
        "validate_batch",
    ],
    "feeding.stream_dataset": ["PackIterDataset"],
    "feeding.grain_packers": ["BestFitPackIterDataset", "FirstFitPackIterDataset"],
    "feeding.operation": ["PackOperation"],
    "feeding.packed_source": ["PackedSource"],
    "feeding.pipeline": ["pack_dataset"],
    "feeding.hosts": ["check_processes", "make_global_batch", "row_shard"],
    "feeding.resuming": ["PackedDataset"],
    "feeding.formats": ["Columns"],
    "feeding.inputs": ["list_shards"],
    "feeding.workers": ["local_map"],
    "feeding.measuring": ["measure_lengths"],
    "feeding.manifest": ["PreparationParameters"],
    "feeding.shards": ["prepare_shard"],
    "feeding.prepared": ["Prepared", "load_prepared"],
    "feeding.verification": ["verify_prepared"],
    "feeding.preparation": ["merge_shards", "prepare"],
    "feeding.row_files": ["decode_row"],
    "feeding.token_store": ["open_sequences", "write_flat"],
    "feeding.upstream": ["JoinedSequences", "RecordSequences"],
    "feeding.token_files": ["open_flat", "open_megatron"],
    "feeding.tables": ["open_table"],
    "feeding.export": ["export_rows"],
    "feeding.distributed": ["ray_map"],
    "model.segments": ["build_packing_attention_bias", "build_packing_cu_seqlens", "from_seed_ids"],
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
