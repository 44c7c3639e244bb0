"""The directories that PyPI seqpack 1.0.0 writes: JSON files, and one `.npy` per length."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seqpack_jax.errors import SeqpackError, fail
from seqpack_jax.feeding.formats import naming
from seqpack_jax.feeding.manifest import problem_of
from seqpack_jax.feeding.storage import allow_open_files, reading
from seqpack_jax.planning.counts import as_counts
from seqpack_jax.planning.histogram import SequencePools
from seqpack_jax.planning.plan import PackingPlan

__all__ = ["is_seed_manifest", "load_seed_directory", "seed_files"]

_AGAIN = "prepare the data set again, best with seqpack_jax"


def is_seed_manifest(text: str) -> bool:
    """Return whether a manifest was written by PyPI seqpack."""
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and "packer" in manifest and "format" not in manifest


def seed_files(root: Path, text: str) -> set[str]:
    """Return the names in `root` that PyPI seqpack writes; none if the manifest is not its own."""
    if not is_seed_manifest(text):
        return set()
    pools = {f"pools/{path.name}" for path in root.glob("pools/*.npy") if path.stem.isdecimal()}
    return {"manifest.json", "counts.json", "templates.json", "pools"} | pools


def load_seed_directory(
    caller: str, root: Path, text: str
) -> tuple[dict[str, Any], NDArray[np.int64], PackingPlan, SequencePools]:
    """Return manifest, counts, plan and pools of a directory that PyPI seqpack 1.0.0 wrote.

    Pools of lengths that are not in `counts.json` are those of an earlier run, and are left out.

    Time: O(size of the plan + max_len): pools are mapped.

    Args:
        caller: the public function that an error shall name.
        root: the directory.
        text: what its `manifest.json` holds.

    Raises:
        SeqpackError: a file is missing or damaged, or they do not fit together.
    """
    manifest = json.loads(text)
    by_length = _read_json(caller, root / "counts.json")
    templates = _read_json(caller, root / "templates.json")
    try:
        with naming(caller, str(root / "counts.json")):
            counts = as_counts(caller, {int(length): n for length, n in by_length.items()})
        with naming(caller, str(root / "templates.json")):
            counter: Counter[tuple[int, ...]] = Counter()
            for lengths, multiplicity in templates:
                counter[tuple(lengths)] += multiplicity
            plan = PackingPlan.from_counter(counter, manifest.get("max_seq_len"))
            plan.check(counts)
    except SeqpackError as error:
        fail(caller, f"{root} does not fit together: {problem_of(error)}", _AGAIN)
    figures = {
        "n_sequences": plan.num_sequences,
        "n_bins": plan.num_bins,
        "total_tokens": plan.num_tokens,
    }
    for name, value in figures.items():
        if manifest.get(name) != value:
            problem = f"{root / 'manifest.json'} has {name} = {manifest.get(name)!r}"
            fail(caller, f"{problem}, the files have {value}", _AGAIN)
    lengths = np.flatnonzero(counts).tolist()
    allow_open_files(len(lengths))
    pools = {length: _map_pool(caller, root, length, int(counts[length])) for length in lengths}
    return manifest, counts, plan, SequencePools.from_mapping(pools)


def _read_json(caller: str, path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        fail(caller, f"{path} cannot be read ({error})", _AGAIN)


def _map_pool(caller: str, root: Path, length: int, count: int) -> NDArray[Any]:
    path = root / "pools" / f"{length}.npy"
    # Whatever NumPy raises on a damaged file, but what the system refuses has its own hints.
    with naming(caller, str(path)), reading(caller, path):
        pool = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(pool, np.ndarray) or pool.ndim != 1 or pool.dtype.kind not in "iu":
        fail(caller, f"{path} is no 1-D array of integers", _AGAIN)
    if len(pool) != count:
        fail(caller, f"{path} holds {len(pool)} ids, counts.json says {count}", _AGAIN)
    if pool.dtype == np.uint64 and (largest := int(pool.max(initial=0))) >= 2**63:
        fail(caller, f"{path} holds the id {largest}, beyond int64", "use ids below 2**63")
    return pool
