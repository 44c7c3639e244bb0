"""The README of the seed library, PyPI seqpack 1.0.0: each example, each deterministic number."""

import json
import pickle
import sqlite3
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given
from seed_library import (
    LENGTHS,
    MASKED,
    TEMPLATES,
    lengths_in,
    lognormal,
    peak_memory,
    planned,
    write_parquet,
    write_seed_directory,
)
from strategies import packings, random_sequences

import seqpack_jax as sp
from seqpack_jax.cli import main

QUICK_START = [128, 64, 32, 16, 200, 80, 50]


# --- Quick start and core packers -------------------------------------------------------------


def test_readme_quick_start():
    """What the seed's code returns.  (The sample in its README puts 328 tokens into 256.)"""
    bins = sp.heap_pack_sequences(QUICK_START, max_seq_len=256)
    assert bins.tolist() == [[4], [0, 5], [1, 6, 2, 3]]
    bins = sp.greedy_pack_sequences(QUICK_START, max_seq_len=256)
    assert bins.tolist() == [[4, 6], [0, 5, 2, 3], [1]]


def test_readme_greedy_is_tighter_on_most_inputs():
    rng = np.random.default_rng(0)
    fewer = Counter()
    for _ in range(60):
        lengths = rng.integers(1, 100, 300)
        greedy = sp.greedy_pack_sequences(lengths, max_seq_len=200)
        fewer[np.sign(len(sp.heap_pack_sequences(lengths, max_seq_len=200)) - len(greedy))] += 1
    assert fewer[-1] == 0
    assert fewer[1] > fewer[0] / 10


def test_readme_per_epoch_randomization():
    lengths = np.repeat([900, 700, 500, 300, 100], 40)
    drawn = []
    for epoch in range(3):
        seed = sp.seed_from_components(epoch)
        bins = sp.heap_pack_sequences(lengths, max_seq_len=2048, tolerance=1, seed=seed)
        again = sp.heap_pack_sequences(lengths, max_seq_len=2048, tolerance=1, seed=seed)
        assert bins.tolist() == again.tolist()
        bins.check(lengths)
        drawn.append(bins)
    fixed = sp.heap_pack_sequences(lengths, max_seq_len=2048)
    assert len({Counter(lengths_in(bins, lengths)).total() for bins in drawn}) == 1
    assert all(lengths_in(bins, lengths) == lengths_in(fixed, lengths) for bins in drawn)
    assert len({str(bins.tolist()) for bins in [*drawn, fixed]}) == 4


@pytest.mark.parametrize("pack", [sp.heap_pack_sequences, sp.greedy_pack_sequences])
def test_readme_tolerance_mixes_near_equal_lengths(pack):
    lengths = np.random.default_rng(1).permutation(np.arange(100, 400))
    templates = {}
    for tolerance in (1, 4, 16):
        drawn = [pack(lengths, 2048, tolerance, seed) for seed in range(4)]
        for bins in drawn:
            bins.check(lengths)
        templates[tolerance] = {tuple(sorted(lengths_in(bins, lengths))) for bins in drawn}
    assert len(templates[1]) == 1
    assert len(templates[4]) == len(templates[16]) == 4


def test_readme_shuffle_bins():
    indices = list(range(10))
    order = sp.shuffle_bins(indices, seed=0)
    assert indices == list(range(10))
    assert sorted(order) == indices
    assert list(order) != indices
    assert list(order) == list(sp.shuffle_bins(indices, seed=0))
    assert list(order) != list(sp.shuffle_bins(indices, seed=1))


@pytest.mark.parametrize(
    ("components", "seed"),
    [
        ((), 16476032584258269876),
        ((0,), 9523843951405948789),
        ((1,), 17797172410793473910),
        ((0, 1, 2), 13785980492234361862),
        ((7, 0, 123456789), 1240686548555303601),
        ((-1,), 2258336317711253734),
    ],
)
def test_readme_seed_from_components_has_the_seeds_values(components, seed):
    assert sp.seed_from_components(*components) == seed


# --- From packed bins to a trainable batch ----------------------------------------------------


def seed_row(ids, sequences, max_seq_len, pad):
    """`pack_one_bin` of the seed's README, and the attention mask that belongs to it."""
    tokens = [token for i in ids for token in sequences[i]]
    sequence_ids = [local for local, i in enumerate(ids) for _ in sequences[i]]
    free = max_seq_len - len(tokens)
    mask = [1] * len(tokens) + [0] * free
    return tokens + [pad] * free, sequence_ids + [sequence_ids[-1]] * free, mask


def test_readme_a_bin_becomes_a_row():
    """Ours numbers segments from 1, and padding is 0 instead of the last sequence's number."""
    sequences = random_sequences(QUICK_START)
    bins = sp.heap_pack_sequences(QUICK_START, max_seq_len=256)
    batch = sp.pack_batch(bins, sequences, 256, lengths=QUICK_START, pad_value=9)
    tokens, sequence_ids, mask = zip(
        *(seed_row(ids, sequences, 256, 9) for ids in bins), strict=True
    )
    np.testing.assert_array_equal(batch.tokens, tokens)
    np.testing.assert_array_equal(batch.segment_ids, sp.from_seed_ids(sequence_ids, mask))
    np.testing.assert_array_equal(batch.segment_ids > 0, np.array(mask, bool))


def test_readme_attention_bias():
    """0 inside a sequence and nothing across, as there; but finite, so that no NaN arises."""
    segment_ids = jnp.array([[1, 1, 2, 2, 0], [1, 2, 3, 3, 3]])
    bias = sp.build_packing_attention_bias(segment_ids, jnp.bfloat16)
    assert bias.shape == (2, 1, 5, 5)
    assert bias.dtype == jnp.bfloat16
    same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    np.testing.assert_array_equal(bias, np.where(same, 0.0, MASKED))
    scores = jax.random.normal(jax.random.key(0), bias.shape, jnp.bfloat16)
    weights = jax.nn.softmax(scores + bias, axis=-1)
    assert not np.asarray(weights)[~np.asarray(same)].any()
    assert np.isfinite(np.asarray(weights, np.float32)).all()


def test_readme_causal_combination():
    segment_ids = jnp.array([[1, 1, 1, 2, 2, 0]])
    later = jnp.triu(jnp.ones((6, 6), bool), 1)
    summed = (
        sp.build_packing_attention_bias(segment_ids) + jnp.where(later, MASKED, 0.0)[None, None]
    )
    combined = sp.build_packing_attention_bias(segment_ids, causal=True)
    np.testing.assert_array_equal(summed == 0, combined == 0)
    # Each sequence has a causal triangle of its own.
    assert (combined[0, 0] == 0).sum(axis=1).tolist() == [1, 2, 3, 1, 2, 1]


def test_readme_a_packed_forward_pass_equals_each_sequence_alone():
    bins = sp.heap_pack_sequences([5, 3, 5, 3], max_seq_len=8)
    batch = sp.pack_batch(bins, random_sequences([5, 3, 5, 3]), 8, lengths=[5, 3, 5, 3])
    table = jax.random.normal(jax.random.key(0), (1000, 1, 4))

    def attend(tokens, bias):
        x = table[tokens]
        return np.asarray(jax.nn.dot_product_attention(x, x, x, bias))

    bias = sp.build_packing_attention_bias(batch.segment_ids, causal=True)
    packed = attend(batch.tokens, bias)
    for row, number in [(0, 1), (0, 2), (1, 1), (1, 2)]:
        here = batch.segment_ids[row] == number
        tokens = batch.tokens[row, here][None]
        causal = sp.build_packing_attention_bias(np.ones_like(tokens), causal=True)
        np.testing.assert_allclose(packed[row, here], attend(tokens, causal)[0], atol=1e-6)


SEED_IDS = jnp.array([[0, 0, 0, 0, 0, 1, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1, 2, 2, 2, 2]])
SEED_MASK = jnp.array([[1, 1, 1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]])


def test_readme_cu_seqlens_example():
    segment_ids = sp.from_seed_ids(SEED_IDS, SEED_MASK)
    cu_seqlens, max_seqlen, overflow = sp.build_packing_cu_seqlens(segment_ids, max_segments=3)
    assert cu_seqlens.dtype == jnp.int32
    # The seed's [0, 5, 8, 12, 14, 18]; the last offset repeats, so that the shape is static.
    assert cu_seqlens.tolist() == [0, 5, 8, 12, 14, 18, 18]
    assert (int(max_seqlen), bool(overflow)) == (5, False)


def test_readme_cu_seqlens_index_the_stream_without_padding():
    sequences = random_sequences(QUICK_START)
    bins = sp.heap_pack_sequences(QUICK_START, max_seq_len=256)
    batch = sp.pack_batch(bins, sequences, 256, lengths=QUICK_START)
    cu_seqlens = sp.build_packing_cu_seqlens(batch.segment_ids, max_segments=4).cu_seqlens
    stream = batch.tokens[batch.segment_ids > 0]
    for k, i in enumerate(bins.ids):
        np.testing.assert_array_equal(stream[cu_seqlens[k] : cu_seqlens[k + 1]], sequences[i])


# --- Histogram packing ------------------------------------------------------------------------


def test_readme_histogram_example():
    counts, pools = sp.length_histogram_from_lengths(LENGTHS)
    assert {n: int(c) for n, c in enumerate(counts) if c} == {5: 5, 3: 3, 7: 1}
    assert [pools[n].tolist() for n in (7, 5, 3)] == [[0], [1, 2, 3, 4, 5], [6, 7, 8]]
    plan = sp.pack_length_histogram_batched(counts, max_seq_len=10)
    assert plan.to_counter() == TEMPLATES
    assert plan.num_bins == 5
    drawn = []
    for number in range(3):
        epoch = sp.materialize_epoch(plan, pools, seed=0, epoch=number)
        assert Counter(lengths_in(epoch, LENGTHS)) == TEMPLATES
        drawn.append(sorted(i for ids in epoch for i in ids.tolist()))
    assert drawn == [list(range(9))] * 3
    epochs = [sp.materialize_epoch(plan, pools, seed=0, epoch=e)[0:5].tolist() for e in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("shuffle", [False, True])
def test_readme_materialize_epoch_takes_the_seeds_counter_and_pools(shuffle):
    """The very call of the seed's README: `(templates, pools, seed=...)`."""
    pools = {7: np.array([0]), 5: np.array([1, 2, 3, 4, 5]), 3: np.array([6, 7, 8])}
    seen = set()
    for epoch in range(3):
        seed = sp.seed_from_components(epoch)
        bins = [i.tolist() for i in sp.materialize_epoch(TEMPLATES, pools, seed, shuffle=shuffle)]
        assert Counter(lengths_in(bins, LENGTHS)) == TEMPLATES
        assert sorted(i for ids in bins for i in ids) == list(range(9))
        seen.add(str(bins))
    assert len(seen) == 3


def test_readme_a_billion_sequences_of_512():
    plan = sp.pack_length_histogram_batched({512: 1_000_000_000}, max_seq_len=2048)
    assert plan.to_counter() == {(512, 512, 512, 512): 250_000_000}


@given(packing=packings())
def test_readme_both_histogram_packers_give_the_same_bins(packing):
    """There "identical or within 1 %"; here they are one function, equal to the per-item packer."""
    lengths, capacity = packing
    options = {"algorithm": "worst_fit_decreasing"}
    counts = Counter(lengths)
    plans = [
        pack(counts, capacity, **options)
        for pack in (sp.pack_length_histogram, sp.pack_length_histogram_batched)
    ]
    assert plans[0].to_counter() == plans[1].to_counter()
    assert plans[0].num_bins == len(reference.worst_fit_decreasing(lengths, capacity))
    for template in plans[0].to_counter():
        assert list(template) == sorted(template, reverse=True)
        assert sum(template) <= capacity


# --- Tips for large-scale datasets ------------------------------------------------------------


def test_readme_counts_and_pools_from_sql(tmp_path):
    """The README's GROUP BY, its counts.json, and one memory-mapped file per length."""
    database = sqlite3.connect(":memory:")
    database.execute("CREATE TABLE dataset (sequence_id INTEGER, length INTEGER)")
    rows = [(100 + i, length) for i, length in enumerate(LENGTHS)]
    database.executemany("INSERT INTO dataset VALUES (?, ?)", rows)
    found = dict(database.execute("SELECT length, COUNT(*) FROM dataset GROUP BY length"))
    (tmp_path / "counts.json").write_text(json.dumps(found))
    for length in found:
        query = f"SELECT sequence_id FROM dataset WHERE length = {length} ORDER BY sequence_id"
        np.save(tmp_path / f"{length}.npy", np.array(database.execute(query).fetchall())[:, 0])
    database.close()

    counts = {int(k): v for k, v in json.loads((tmp_path / "counts.json").read_text()).items()}
    maps = {n: np.load(tmp_path / f"{n}.npy", mmap_mode="r") for n in counts}
    pools = sp.SequencePools.from_mapping(maps)
    assert pools[5].tolist() == [101, 102, 103, 104, 105]
    plan = sp.pack_length_histogram(counts, max_seq_len=10)
    assert plan.to_counter() == TEMPLATES
    for given_pools in (maps, pools, pickle.loads(pickle.dumps(pools))):
        epoch = sp.materialize_epoch(plan, given_pools, seed=1)
        assert sorted(epoch[0:5].ids.tolist()) == list(range(100, 109))


def test_readme_cached_templates(tmp_path):
    plan = sp.pack_length_histogram(Counter(LENGTHS), max_seq_len=10)
    plan.save(tmp_path / "templates_max10.npz")
    again = sp.PackingPlan.load(tmp_path / "templates_max10.npz")
    assert (again.digest(), again.certificate) == (plan.digest(), plan.certificate)
    # What the seed pickled can be used on.
    templates = pickle.loads(pickle.dumps(Counter(TEMPLATES)))
    assert sp.PackingPlan.from_counter(templates, max_seq_len=10).to_counter() == TEMPLATES


def test_readme_templates_are_a_few_hundred_kilobytes(tmp_path):
    counts = np.bincount(lognormal(100_000)) * 10_000
    plan = sp.pack_length_histogram(counts, max_seq_len=2048)
    assert plan.num_sequences == 1_000_000_000
    plan.save(tmp_path / "plan.npz")
    assert (tmp_path / "plan.npz").stat().st_size < 400_000
    assert len(pickle.dumps(plan)) < 100_000


def test_readme_over_length_is_a_value_error():
    with pytest.raises(ValueError, match=r"counts\[11\] = 2, but max_seq_len is 10"):
        sp.pack_length_histogram({3: 1, 11: 2}, max_seq_len=10)


def test_readme_tolerance_works_on_histograms_too():
    """There it has no effect on them; here the bins it costs are in the plan."""
    counts = np.bincount(np.random.default_rng(0).integers(30, 300, 5000))
    plan = sp.pack_length_histogram(counts, max_seq_len=512)
    coarse = sp.pack_length_histogram(counts, max_seq_len=512, tolerance=16)
    assert np.unique(coarse.lengths).tolist() == list(range(32, 305, 16))
    assert coarse.tolerance_rows == coarse.num_bins - plan.num_bins > 0
    assert plan.tolerance_rows == 0


def test_readme_the_stateless_permutation_is_there():
    """ "This isn't implemented yet", says the seed: O(1) access to a permuted pool."""
    counts = {512: 3 * 10**9}
    plan = sp.pack_length_histogram(counts, max_seq_len=2048)

    def read():
        epoch = sp.materialize_epoch(plan, sp.SequencePools.identity(counts), seed=0)
        assert len(set(epoch.bins(range(0, len(epoch), 10**7)).ids.tolist())) == 300

    assert peak_memory(read) < 1_000_000


def test_readme_sharded_packing():
    corpora = [lognormal(3000, seed=k) for k in range(3)]
    each = [planned(lengths, 2048) for lengths in corpora]
    pools = sp.SequencePools.from_shards([own for _, own in each], bases=[0, 3000, 6000])
    plan = sp.pack_length_histogram(pools.counts, max_seq_len=2048)
    alone = sum(plan.num_bins for plan, _ in each)
    assert plan.num_bins <= alone <= plan.num_bins + 3, "negligible loss at the boundaries"
    epoch = sp.materialize_epoch(plan, pools, seed=0)
    epoch[0 : len(epoch)].check(np.concatenate(corpora))


def test_readme_prepare_and_load_prepared(tmp_path, capsys):
    ids = np.arange(9) * 10 + 3
    path = write_parquet(tmp_path / "dataset.parquet", seq_len_tokens=LENGTHS, doc_id=ids)
    arguments = ["--length-column", "seq_len_tokens", "--id-column", "doc_id"]
    arguments += ["--max-seq-len", "10", "--output", str(tmp_path / "prepared"), "--workers", "1"]
    assert main(["prepare", "--input", str(path), *arguments]) == 0
    capsys.readouterr()
    manifest, counts, plan, pools = sp.load_prepared(tmp_path / "prepared")
    assert isinstance(manifest, dict)
    assert plan.max_seq_len == 10
    assert {n: int(c) for n, c in enumerate(counts) if c} == Counter(LENGTHS)
    assert plan.to_counter() == TEMPLATES
    assert pools[5].tolist() == ids[1:6].tolist()
    for number in range(2):
        epoch = sp.materialize_epoch(plan, pools, seed=sp.seed_from_components(number))
        assert sorted(epoch[0:5].ids.tolist()) == ids.tolist()


def test_readme_prepare_without_an_id_column_uses_the_row_number(tmp_path):
    path = write_parquet(tmp_path / "dataset.parquet", n=LENGTHS)
    prepared = sp.prepare(path, tmp_path / "prepared", 10, length_column="n")
    assert prepared.pools[3].tolist() == [6, 7, 8]


def test_readme_filter_over_cap(tmp_path, capsys):
    """A flag of the seed's README that its code does not have: here `--over-length drop`."""
    path = write_parquet(tmp_path / "dataset.parquet", n=[*LENGTHS, 11, 25])
    arguments = ["prepare", "--input", str(path), "--length-column", "n", "--max-seq-len", "10"]
    arguments += ["--workers", "1"]
    assert main([*arguments, "--output", str(tmp_path / "refused")]) == 2
    assert "11" in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()
    output = str(tmp_path / "prepared")
    assert main([*arguments, "--over-length", "drop", "--output", output]) == 0
    prepared = sp.load_prepared(output)
    assert prepared.plan.to_counter() == TEMPLATES
    assert prepared.pools.report.sequences == 2
    assert prepared.pools.report.dropped_tokens == 36


@pytest.mark.parametrize(("level", "logs"), [("ERROR", False), ("DEBUG", True)])
def test_readme_loglevel(tmp_path, capsys, monkeypatch, level, logs):
    """The seed's README names it; its code does not read it."""
    monkeypatch.setenv("LOGLEVEL", level)
    path = write_parquet(tmp_path / "dataset.parquet", n=LENGTHS)
    arguments = ["--length-column", "n", "--max-seq-len", "10", "--workers", "1"]
    output = str(tmp_path / "prepared")
    assert main(["prepare", "--input", str(path), "--output", output, *arguments]) == 0
    assert ("rows: 9" in capsys.readouterr().err) == logs


def test_readme_packer_flag(tmp_path):
    """`--packer per-item` and `batched` are one algorithm here, `worst_fit_decreasing`."""
    lengths = lognormal(2000).tolist()
    path = write_parquet(tmp_path / "dataset.parquet", n=lengths)
    options = {"length_column": "n", "algorithm": "worst_fit_decreasing"}
    plan = sp.prepare(path, tmp_path / "prepared", 2048, **options).plan
    expected = sp.pack_length_histogram(
        Counter(lengths), max_seq_len=2048, algorithm="worst_fit_decreasing"
    )
    assert plan.digest() == expected.digest()


def test_readme_loads_what_seqpack_1_0_0_prepared(tmp_path):
    ids = np.arange(9) + 100
    path = write_seed_directory(tmp_path / "prepared", np.array(LENGTHS), ids, TEMPLATES, 10)
    _, counts, plan, pools = sp.load_prepared(path)
    assert counts.tolist() == [0, 0, 0, 3, 0, 5, 0, 1]
    assert plan.to_counter() == TEMPLATES
    assert plan.max_seq_len == 10
    assert pools[5].tolist() == [101, 102, 103, 104, 105]
    epoch = sp.materialize_epoch(plan, pools, seed=0)
    assert sorted(epoch[0:5].ids.tolist()) == ids.tolist()


def test_readme_rank_seeding_becomes_a_shard():
    """(epoch, rank) always gives the same rows, across restarts, and no id twice."""
    plan, pools = planned(lognormal(500), 2048)

    def rows_of(rank):
        epoch = sp.materialize_epoch(plan, pools, seed=17, epoch=2)
        return [ids.tolist() for ids in epoch.shard(rank, 3)]

    rows = [rows_of(rank) for rank in range(3)]
    assert rows == [rows_of(rank) for rank in range(3)]
    assert len({len(each) for each in rows}) == 1
    assert sorted(i for each in rows for ids in each for i in ids) == list(range(500))


# --- PackingStats -----------------------------------------------------------------------------


def test_readme_packing_stats_sample():
    """Its sample, line for line; but for p90 and p99, which are interpolated there (bug 14)."""
    fills = [246, 256, 30, 248, 246]
    lengths = [fill - 2 for fill in fills] + [1] * 10
    bins = [[k, 5 + 2 * k, 6 + 2 * k] for k in range(5)]
    stats = sp.PackingStats.from_bins(bins, lengths, max_seq_len=256)
    assert str(stats).splitlines()[:7] == [
        "PackingStats(",
        "  bins:        5",
        "  sequences:   15 (avg 3.00/bin)",
        "  tokens:      1,026 / 1,280 capacity",
        "  efficiency:  80.16%",
        "  padding:     254 (19.84%)",
        "  fullness:    p50=96.1%  p90=100.0%  p99=100.0%",
    ]
    assert str(stats).splitlines()[-1] == ")"
    assert stats.efficiency == 1026 / 1280
    assert stats.padding_ratio == pytest.approx(254 / 1280)
    assert stats.fullness_p50 == 246 / 256


def test_readme_packing_stats_of_the_quick_start():
    """What the seed prints for it, whole."""
    bins = sp.heap_pack_sequences(QUICK_START, max_seq_len=256)
    stats = sp.PackingStats.from_bins(bins, QUICK_START, max_seq_len=256)
    assert "\n".join(str(stats).splitlines()[1:6]) == (
        "  bins:        3\n"
        "  sequences:   7 (avg 2.33/bin)\n"
        "  tokens:      570 / 768 capacity\n"
        "  efficiency:  74.22%\n"
        "  padding:     198 (25.78%)"
    )


def test_readme_packing_stats_of_templates():
    stats = sp.PackingStats.from_templates(Counter(TEMPLATES), max_seq_len=10)
    assert str(stats).splitlines()[1:7] == [
        "  bins:        5",
        "  sequences:   9 (avg 1.80/bin)",
        "  tokens:      41 / 50 capacity",
        "  efficiency:  82.00%",
        "  padding:     9 (18.00%)",
        "  fullness:    p50=100.0%  p90=100.0%  p99=100.0%",
    ]


def test_readme_packing_stats_of_a_billion():
    """Time and memory are those of the templates."""
    templates = {(512, 512, 512, 512): 250_000_000, (1000, 900, 20): 10**8}

    def measure():
        stats = sp.PackingStats.from_templates(templates, max_seq_len=2048)
        assert stats.num_sequences == 1_300_000_000

    assert peak_memory(measure) < 1_000_000


def test_readme_typical_lengths_pack_above_97_percent():
    plan, _ = planned(lognormal(20_000), 2048)
    assert sp.PackingStats.from_plan(plan).efficiency >= 0.97


# --- A Dataset class --------------------------------------------------------------------------


class MapStyle:
    """The README's map-style `PackedDataset`, without torch."""

    def __init__(self, raw, lengths, max_seq_len):
        self.raw = raw
        counts, self.pools = sp.length_histogram_from_lengths(lengths)
        self.templates = sp.pack_length_histogram_batched(counts, max_seq_len)
        self.bins = []

    def set_epoch(self, epoch):
        seed = sp.seed_from_components(epoch)
        self.bins = list(sp.materialize_epoch(self.templates, self.pools, seed=seed))

    def __len__(self):
        return len(self.bins)

    def __getitem__(self, index):
        return [self.raw[i] for i in self.bins[index]]


class StreamStyle:
    """The README's stream-style `PackedDataset`, without torch."""

    def __init__(self, raw, length_counts, length_to_indices, max_seq_len):
        self.raw = raw
        self.pools = length_to_indices
        self.templates = sp.pack_length_histogram_batched(length_counts, max_seq_len)
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        seed = sp.seed_from_components(self.epoch)
        for ids in sp.materialize_epoch(self.templates, self.pools, seed=seed):
            yield [self.raw[i] for i in ids]


def words(rows):
    return sorted(word for row in rows for word in row)


def test_readme_map_style_dataset():
    raw = [chr(ord("a") + i) * n for i, n in enumerate(LENGTHS)]
    dataset = MapStyle(raw, LENGTHS, 10)
    epochs = []
    for epoch in range(2):
        dataset.set_epoch(epoch)
        assert len(dataset) == 5
        epochs.append([dataset[i] for i in range(5)])
        assert words(epochs[-1]) == sorted(raw)
        assert all(sum(map(len, row)) <= 10 for row in epochs[-1])
    assert epochs[0] != epochs[1]


def test_readme_stream_style_dataset():
    raw = [chr(ord("a") + i) * n for i, n in enumerate(LENGTHS)]
    pools = {n: np.flatnonzero(np.array(LENGTHS) == n) for n in (7, 5, 3)}
    dataset = StreamStyle(raw, Counter(LENGTHS), pools, 10)
    assert words(dataset) == sorted(raw)
    assert list(dataset) == list(dataset)
    first = list(dataset)
    dataset.set_epoch(1)
    assert list(dataset) != first
