"""What the tests on the seed library share: its README's examples, and its prepared directories."""

import json
import tracemalloc
from collections import Counter

import numpy as np

import seqpack_jax as sp

LENGTHS = [7, 5, 5, 5, 5, 5, 3, 3, 3]
TEMPLATES = {(5, 5): 2, (7, 3): 1, (5, 3): 1, (3,): 1}
MASKED = -(2.0**41)  # what a bias holds where attention is barred


def lengths_in(bins, lengths):
    """The template of each bin."""
    return [tuple(lengths[i] for i in ids) for ids in bins]


def lognormal(number, limit=2048, seed=0):
    rng = np.random.default_rng(seed)
    return np.clip(np.exp(rng.normal(np.log(300), 1, number)), 1, limit).astype(int)


def peak_memory(function):
    """Bytes that `function` allocates at most at once."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def write_parquet(path, **columns):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def write_seed_directory(path, lengths, ids, templates, max_seq_len):
    """What `seqpack.prepare.prepare` of the seed writes, line for line."""
    counts = Counter(lengths.tolist())
    (path / "pools").mkdir(parents=True, exist_ok=True)
    (path / "counts.json").write_text(json.dumps({str(k): v for k, v in counts.items()}))
    (path / "templates.json").write_text(json.dumps([[list(t), m] for t, m in templates.items()]))
    for length in counts:
        np.save(path / "pools" / f"{length}.npy", ids[lengths == length])
    bins, tokens = sum(templates.values()), int(lengths.sum())
    manifest = {
        "max_seq_len": max_seq_len,
        "packer": "batched",
        "n_sequences": len(lengths),
        "n_bins": bins,
        "distinct_lengths": len(counts),
        "distinct_templates": len(templates),
        "total_tokens": tokens,
        "total_capacity": bins * max_seq_len,
        "efficiency": tokens / (bins * max_seq_len) if bins else 0.0,
    }
    (path / "manifest.json").write_text(json.dumps(manifest, indent=2))
    return path


def planned(lengths, max_seq_len, **options):
    counts, pools = sp.length_histogram_from_lengths(lengths)
    return sp.pack_length_histogram(counts, max_seq_len, **options), pools
