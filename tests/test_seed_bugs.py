"""The bugs 1 to 20 of the seed library, PyPI seqpack 1.0.0: the right behaviour for each."""

import importlib
import importlib.metadata
import inspect
import pickle
import pkgutil
import sys
from collections import Counter
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
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
from seqpack_jax.model import losses, segments

# --- Its bugs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", [sp.heap_pack_sequences, sp.greedy_pack_sequences])
def test_bug_01_over_long_sequences_are_refused(pack):
    """The seed packed 10 tokens into a bin of 8, and its stats then said 143 % and -7 padding."""
    with pytest.raises(sp.SeqpackError, match=r"lengths\[0\] = 10, but max_seq_len is 8"):
        pack([10, 3], 8)
    assert pack([10, 3], 8, over_length="split").tolist() == [[2], [1, 3]]
    with pytest.raises(sp.SeqpackError, match=r"lengths\[0\] = 10"):
        sp.PackingStats.from_bins([[0], [1]], [10, 3], 8)
    with pytest.raises(sp.SeqpackError, match="holds 9 tokens of 8"):
        sp.PackingStats.from_bins([[0, 1]], [6, 3], 8)


@pytest.mark.parametrize("length", [0, -4])
def test_bug_02_lengths_below_one_are_refused(length):
    """The seed divided by zero, or let a bin grow by a sequence of negative length."""
    for pack in (sp.heap_pack_sequences, sp.greedy_pack_sequences):
        with pytest.raises(sp.SeqpackError, match=rf"lengths\[1\] = {length}, but a length is at"):
            pack([5, length, 7], 8)
    for pack in (sp.pack_length_histogram, sp.pack_length_histogram_batched):
        with pytest.raises(sp.SeqpackError, match=f"(counts.0. = 2|length {length})"):
            pack({length: 2, 3: 1}, 8)


def test_bug_02_tolerance_zero_is_refused():
    """The seed divided by zero with a warning, and packed in no order at all."""
    for pack in (sp.heap_pack_sequences, sp.greedy_pack_sequences):
        with pytest.raises(sp.SeqpackError, match="tolerance = 0"):
            pack([5, 3], 8, tolerance=0)
    with pytest.raises(sp.SeqpackError, match="tolerance = 0"):
        sp.sort_indices_by_length([5, 3], tolerance=0)


def test_bug_03_truncation_acts_on_the_tokens(tmp_path):
    """The seed clipped the recorded length only: a bin for 10 tokens held 100."""
    lengths, sequences = [100, 8], [np.arange(100), np.arange(8)]
    with pytest.raises(sp.SeqpackError, match=r"lengths\[0\] = 100, but max_seq_len is 10"):
        sp.length_histogram_from_lengths(lengths, max_seq_len=10)
    path = write_parquet(tmp_path / "dataset.parquet", n=lengths)
    options = {"length_column": "n", "over_length": "truncate"}
    prepared = sp.prepare(path, tmp_path / "prepared", 10, **options)
    report = prepared.pools.report
    assert (report.sequences, report.tokens, report.dropped_tokens) == (1, 100, 90)
    assert prepared.plan.num_tokens == 18
    source = sp.PackedSource(prepared.plan, prepared.pools, sequences, batch_size=2)
    tokens, segment_ids = source[0]["tokens"], source[0]["segment_ids"]
    assert sorted(tokens[segment_ids > 0].tolist()) == sorted([*range(10), *range(8)])


def test_bug_03_a_clipped_directory_of_the_seed_is_found_out(tmp_path):
    """A plan for 10 tokens of a sequence that has 100 never becomes a row."""
    lengths = np.array([10, 8])
    templates = {(10,): 1, (8,): 1}
    path = write_seed_directory(tmp_path / "prepared", lengths, np.arange(2), templates, 10)
    _, _, plan, pools = sp.load_prepared(path)
    source = sp.PackedSource(plan, pools, [np.arange(100), np.arange(8)], batch_size=2)
    with pytest.raises(sp.SeqpackError, match="sequence 0 has 100 tokens, but 10 were planned"):
        source[0]


def test_bug_04_the_sort_is_stable():
    """The seed's "stable sort" was none: 99.9 % of the positions differed, by kind of CPU."""
    lengths = np.random.default_rng(0).integers(1, 51, 100_000)
    order = sp.sort_indices_by_length(lengths)
    assert order.dtype == np.int64
    assert order.tolist() == sorted(range(100_000), key=lambda i: -lengths[i])
    shuffled = sp.sort_indices_by_length(lengths, seed=3)
    assert np.array_equal(lengths[shuffled], lengths[order])
    assert np.array_equal(np.sort(shuffled), np.arange(100_000))
    assert np.mean(shuffled == order) < 0.01
    assert np.array_equal(shuffled, sp.sort_indices_by_length(lengths, seed=3))


@pytest.mark.parametrize("causal", [False, True])
def test_bug_05_no_real_token_attends_to_padding(causal):
    """In the seed padding had the id of the last sequence, which attended to it."""
    segment_ids = sp.from_seed_ids(jnp.array([[0, 0, 1, 1, 1, 1]]), jnp.array([[1, 1, 1, 1, 0, 0]]))
    bias = np.asarray(sp.build_packing_attention_bias(segment_ids, causal=causal))[0, 0]
    assert (bias[:4, 4:] == MASKED).all()
    assert (bias[4:, :4] == MASKED).all()
    assert (np.tril(bias[2:4, 2:4]) == 0).all()
    cu_seqlens = sp.build_packing_cu_seqlens(segment_ids, max_segments=2).cu_seqlens
    assert cu_seqlens.tolist() == [0, 2, 4]


def test_bug_06_labels_and_positions_stay_inside_a_sequence():
    """In the seed's example the last token of A was to predict the first of B."""
    bins = sp.heap_pack_sequences([3, 2], max_seq_len=6)
    batch = sp.pack_batch(bins, [[5, 6, 7], [8, 9]], 6, lengths=[3, 2])
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 0]]
    labels, weights = losses.next_token_labels(batch.tokens, batch.segment_ids)
    assert labels.tolist() == [[6, 7, -100, 9, -100, -100]]
    assert (np.asarray(weights) > 0).tolist() == [[True, True, False, True, False, False]]


@given(packing=packings(max_size=12, max_capacity=16))
def test_bug_07_dense_and_varlen_masks_agree(packing):
    """In the seed equal ids anywhere in a row were one sequence to one, each run to the other."""
    lengths, capacity = packing
    bins = sp.heap_pack_sequences(lengths, capacity)
    batch = sp.pack_batch(bins, random_sequences(lengths), capacity, lengths=lengths)
    rows = np.zeros((12, 16), np.int32)  # one shape, one compilation
    rows[: len(bins), :capacity] = batch.segment_ids
    cu_seqlens = np.asarray(sp.build_packing_cu_seqlens(rows, max_segments=16).cu_seqlens)
    stream = np.searchsorted(cu_seqlens, np.arange(np.count_nonzero(rows)), side="right")
    varlen = np.zeros(rows.shape, np.int64)
    varlen[rows > 0] = stream
    same = (varlen[:, :, None] == varlen[:, None, :]) & (rows > 0)[:, :, None]
    dense = np.asarray(segments.segment_mask(rows, causal=False))[:, 0] & (rows > 0)[:, :, None]
    np.testing.assert_array_equal(dense, same)


def test_bug_07_an_id_that_comes_again_is_refused():
    """Where the two would disagree, `validate_batch` says so."""
    ids = np.array([[1, 1, 2, 2, 0], [1, 1, 2, 1, 0]], np.int32)
    batch = sp.PackedBatch(ids, ids, np.zeros_like(ids), {})
    with pytest.raises(sp.SeqpackError, match=r"row 1.*token 3"):
        sp.validate_batch(batch._replace(positions=segments.positions_from_segment_ids(ids)))


def test_bug_07_no_nan_and_no_changing_shapes():
    """In the seed -inf in a fully masked row gave NaN, and `cu_seqlens` could not be jitted."""
    rows = jnp.array([[1, 1, 2, 2], [0, 0, 0, 0], [1, 2, 3, 4]])
    bias = sp.build_packing_attention_bias(rows, jnp.bfloat16)
    again = bias + jnp.full((4,), MASKED, jnp.bfloat16)[None, None, None]
    assert not np.isnan(np.asarray(jax.nn.softmax(again, axis=-1), np.float32)).any()
    jitted = jax.jit(lambda ids: sp.build_packing_cu_seqlens(ids, max_segments=4).cu_seqlens)
    assert jitted(rows).shape == jitted(rows[::-1]).shape == (13,)
    assert jitted(rows)[:7].tolist() == [0, 2, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("remainder", ["pad", "drop"])
def test_bug_08_ranks_share_one_epoch(remainder):
    """With the seed's advice, four ranks saw {0,1,2,2,4,4,5,7} of 8 sequences."""
    lengths = [6, 6, 6, 6, 6, 6, 6, 6]
    plan, pools = planned(lengths, 8)
    epoch = sp.materialize_epoch(plan, pools, seed=sp.seed_from_components(0))
    shards = [epoch.shard(rank, 4, remainder=remainder) for rank in range(4)]
    assert [len(shard) for shard in shards] == [2] * 4
    assert sorted(i for shard in shards for ids in shard for i in ids.tolist()) == list(range(8))
    assert shards[1][1].tolist() == epoch[5].tolist()


def test_bug_08_every_rank_takes_the_same_number_of_steps():
    """Eight rows on three ranks: one is padded, or two are dropped; no rank waits for another."""
    plan, pools = planned([6] * 8, 8)
    epoch = sp.materialize_epoch(plan, pools, seed=0)
    padded = [[i.tolist() for i in epoch.shard(rank, 3, remainder="pad")] for rank in range(3)]
    assert [len(rows) for rows in padded] == [3, 3, 3]
    assert sorted(i for rows in padded for ids in rows for i in ids) == list(range(8))
    assert padded[2][2] == []
    dropped = [[i.tolist() for i in epoch.shard(rank, 3, remainder="drop")] for rank in range(3)]
    assert [len(rows) for rows in dropped] == [2, 2, 2]
    assert dropped == [rows[:2] for rows in padded]


def test_bug_09_the_order_of_a_dict_does_not_matter():
    """The seed drew permutations in dict order, which `glob` decided: other hosts, other epochs."""
    pools = {7: np.array([0]), 5: np.array([1, 2, 3, 4, 5]), 3: np.array([6, 7, 8])}
    expected = [i.tolist() for i in sp.materialize_epoch(TEMPLATES, pools, seed=5)]
    for order in ([3, 7, 5], [5, 3, 7]):
        moved = {length: pools[length] for length in order}
        assert [i.tolist() for i in sp.materialize_epoch(TEMPLATES, moved, seed=5)] == expected
    backwards = dict(reversed(TEMPLATES.items()))
    assert [i.tolist() for i in sp.materialize_epoch(backwards, pools, seed=5)] == expected
    counts = {length: len(ids) for length, ids in pools.items()}
    plan = sp.pack_length_histogram(counts, 10)
    assert plan.digest() == sp.pack_length_histogram(dict(reversed(counts.items())), 10).digest()


def test_bug_09_the_order_of_a_directory_does_not_matter(tmp_path, monkeypatch):
    """The same for a directory of the seed, whatever order the file system lists."""
    import os
    from pathlib import Path

    lengths = np.array(LENGTHS)
    path = write_seed_directory(tmp_path / "prepared", lengths, np.arange(9), TEMPLATES, 10)

    def epoch_of(order):
        with monkeypatch.context() as patched:
            for owner, name in ((Path, "glob"), (Path, "iterdir"), (Path, "rglob")):
                original = getattr(owner, name)

                def listed(self, *args, _original=original, **options):
                    return iter(order(sorted(_original(self, *args, **options))))

                patched.setattr(owner, name, listed)
            names = os.listdir
            patched.setattr(os, "listdir", lambda *a: order(sorted(names(*a))))
            _, _, plan, pools = sp.load_prepared(path)
            return [ids.tolist() for ids in sp.materialize_epoch(plan, pools, seed=5)]

    assert epoch_of(list) == epoch_of(lambda found: found[::-1])


def test_bug_10_an_extra_pool_file_is_an_error_that_names_it(tmp_path):
    """The seed left old pools where it wrote new ones, and loaded both."""
    path = write_parquet(tmp_path / "dataset.parquet", n=LENGTHS)
    sp.prepare(path, tmp_path / "prepared", 10, length_column="n")
    sp.load_prepared(tmp_path / "prepared")
    np.save(tmp_path / "prepared" / "pools" / "old.ids.npy", np.arange(3))
    with pytest.raises(sp.SeqpackError, match=r"old\.ids\.npy"):
        sp.load_prepared(tmp_path / "prepared")


def test_bug_10_preparing_again_leaves_nothing_of_the_old_run(tmp_path):
    """`overwrite=True` replaces the directory; without it, an existing one is an error."""
    old = write_parquet(tmp_path / "old.parquet", n=[9, 8, 7, 6, 2])
    new = write_parquet(tmp_path / "new.parquet", n=[5, 3])
    output = tmp_path / "prepared"
    sp.prepare(old, output, 10, length_column="n")
    with pytest.raises(sp.SeqpackError, match="prepared"):
        sp.prepare(new, output, 10, length_column="n")
    sp.prepare(new, output, 10, length_column="n", overwrite=True)
    prepared = sp.load_prepared(output)
    assert prepared.pools.num_sequences == prepared.plan.num_sequences == 2


def test_bug_10_stale_pools_of_a_seed_directory_are_ignored(tmp_path):
    """Its manifest said 2 sequences, its pools held 5 ids."""
    lengths = np.array([5, 3])
    path = write_seed_directory(tmp_path / "prepared", lengths, np.arange(2), {(5, 3): 1}, 10)
    np.save(path / "pools" / "9.npy", np.array([0, 1, 2]))
    _, counts, plan, pools = sp.load_prepared(path)
    assert pools.num_sequences == plan.num_sequences == 2
    assert np.flatnonzero(counts).tolist() == [3, 5]
    assert len(pools[9]) == 0
    assert sorted(sp.materialize_epoch(plan, pools, seed=0)[0].tolist()) == [0, 1]


@pytest.mark.parametrize("size", [4, 6])
def test_bug_11_a_plan_that_does_not_fit_its_pools_is_refused_at_once(size):
    """In the seed a small pool was an IndexError mid-epoch, and a large one lost sequences."""
    pools = {7: np.arange(1), 5: np.arange(1, 1 + size), 3: np.arange(10, 13)}
    with pytest.raises(
        sp.SeqpackError, match=f"hold {size} sequences of planned length 5, .* 5 sl"
    ):
        sp.materialize_epoch(TEMPLATES, pools, seed=0)


def pairs_of(epoch):
    return {(a, b) for ids in epoch for a in ids.tolist() for b in ids.tolist() if a < b}


def test_bug_12_pairs_do_not_come_again():
    """In the seed 27.4 % of the pairs of an epoch recurred in the next."""
    plan, pools = planned(lognormal(20_000), 2048, tolerance=8)
    pairs = [pairs_of(sp.materialize_epoch(plan, pools, seed=0, epoch=e)) for e in range(2)]
    assert len(pairs[0] & pairs[1]) / len(pairs[0]) < 0.1


def test_bug_12_distinct_lengths_still_mix():
    """With all lengths different, five seeds of the seed gave one packing, and one order of it."""
    lengths = np.arange(100, 200)
    plan, pools = planned(lengths, 1000)
    fixed = {sp.materialize_epoch(plan, pools, seed=s)[0:5].ids.tobytes() for s in range(5)}
    assert len(fixed) == 5, "the order of the bins"
    plan, pools = planned(lengths, 1000, tolerance=20)
    drawn = [frozenset(pairs_of(sp.materialize_epoch(plan, pools, seed=s))) for s in range(5)]
    assert len(set(drawn)) == 5, "the pairings"


def test_bug_12_bins_of_one_template_do_not_follow_one_another():
    """By default, the seed's epoch was one template after another."""
    plan, pools = planned([6] * 100 + [5] * 100, 11 - 1)
    templates = lengths_in(sp.materialize_epoch(plan, pools, seed=0), [6] * 100 + [5] * 100)
    changes = sum(a != b for a, b in pairwise(templates))
    assert changes > 30


def test_bug_13_both_packers_give_the_per_item_result():
    """In the seed they differed by 2 bins here, 40 and 38, and its README said by at most 1."""
    counts = {34: 22, 113: 24, 137: 14, 41: 38, 27: 10}
    lengths = [length for length, count in counts.items() for _ in range(count)]
    for pack in (sp.pack_length_histogram, sp.pack_length_histogram_batched):
        assert pack(counts, 200, algorithm="worst_fit_decreasing").num_bins == 40
    assert len(sp.heap_pack_sequences(lengths, 200)) == 40


def test_bug_14_percentiles_do_not_depend_on_the_constructor():
    """In the seed p50 was 0.7 from bins and 0.4 from templates."""
    lengths = [10, 4]
    from_bins = sp.PackingStats.from_bins([[0], [1]], lengths, 10)
    from_templates = sp.PackingStats.from_templates({(10,): 1, (4,): 1}, 10)
    from_plan = sp.PackingStats.from_plan(sp.pack_length_histogram({10: 1, 4: 1}, 10))
    assert from_bins.fullness_p50 == from_templates.fullness_p50 == from_plan.fullness_p50 == 0.4
    assert str(from_bins) == str(from_templates) == str(from_plan)


@given(packing=packings())
def test_bug_14_all_three_constructors_agree(packing):
    """Whatever is packed."""
    lengths, capacity = packing
    plan = sp.pack_length_histogram(Counter(lengths), capacity)
    bins = sp.pack_sequences(lengths, capacity)
    stats = [
        sp.PackingStats.from_plan(plan),
        sp.PackingStats.from_bins(bins, lengths, capacity),
        sp.PackingStats.from_bins(bins.tolist(), lengths, capacity),
        sp.PackingStats.from_templates(plan.to_counter(), capacity),
    ]
    assert stats.count(stats[0]) == 4


def test_bug_15_only_integers_make_a_seed():
    """In the seed ("1:2", 3) and (1, "2:3") had one seed."""
    for components in (("1:2", 3), (1, "2:3"), (1.0,), (True,)):
        with pytest.raises(sp.SeqpackError, match=r"components\[\d\] = .* is not an integer"):
            sp.seed_from_components(*components)
    some = [(), (0,), (1, 2), (12,), (1, 2, 3), (12, 3), (1, 23), (-1, 2), (1, -2)]
    assert len({sp.seed_from_components(*components) for components in some}) == len(some)


def test_bug_16_tolerance_plans_the_next_multiple():
    """In the seed 4 and 7 mixed and 7 and 8 did not, in buckets in no order."""
    plan = sp.pack_length_histogram({4: 1, 5: 1, 7: 1, 8: 1, 9: 1}, 64, tolerance=4)
    assert plan.to_counter() == {(12, 8, 8, 8, 4): 1}
    lengths = [7, 9, 4, 8, 5]
    assert sp.sort_indices_by_length(lengths, tolerance=4).tolist() == [1, 0, 3, 4, 2]
    moved = {tuple(sp.sort_indices_by_length(lengths, 4, seed).tolist()) for seed in range(40)}
    assert {order[0] for order in moved} == {1}
    assert {order[4] for order in moved} == {2}
    assert len(moved) == 6, "5, 7 and 8 in any order"


def test_bug_16_the_order_still_falls():
    """In the seed `tolerance > 1` cost bins even without a seed, and nobody was told how many."""
    lengths = np.random.default_rng(0).integers(30, 300, 2000)
    planned_lengths = -(-lengths // 16) * 16
    order = sp.sort_indices_by_length(lengths, tolerance=16, seed=1)
    assert (np.diff(planned_lengths[order]) <= 0).all()
    plan = sp.pack_length_histogram(Counter(lengths.tolist()), 512, tolerance=16)
    bins = sp.pack_sequences(lengths, 512, tolerance=16, seed=1)
    exact = sp.pack_sequences(planned_lengths, 512)
    assert len(bins) == len(exact) == plan.num_bins
    assert plan.tolerance_rows == plan.num_bins - len(sp.pack_sequences(lengths, 512))


def calls_of(function):
    """How many functions, of Python or of C, are called."""
    count = 0

    def profile(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(before)
    return count


def test_bug_17_one_pass_whatever_the_number_of_distinct_lengths():
    """The seed scanned all lengths once for each distinct one: here the work does not grow."""
    few, many = np.arange(60_000) % 10 + 1, np.arange(60_000) % 20_000 + 1
    sp.length_histogram_from_lengths(few)
    calls = [calls_of(lambda a=a: sp.length_histogram_from_lengths(a)) for a in (few, many)]
    assert calls[0] > 5
    assert calls[1] <= calls[0] + 5


def test_bug_18_an_epoch_copies_no_pool(tmp_path):
    """The seed copied and shuffled every pool up front, memory maps too."""
    lengths = np.arange(1_000_000) % 4 + 5
    plan, pools = planned(lengths, 16)
    np.save(tmp_path / "ids.npy", pools.ids)
    mapped = sp.SequencePools(np.load(tmp_path / "ids.npy", mmap_mode="r"), pools.starts)

    def read():
        epoch = sp.materialize_epoch(plan, mapped, seed=0)
        assert len(epoch[len(epoch) // 2]) > 1
        assert len(epoch.shard(1, 4)[7]) > 1

    read()
    assert peak_memory(read) < 1_000_000, "the pools are 8 MB"
    assert len(pickle.dumps(mapped)) < 5_000


def test_bug_19_planning_is_independent_of_the_number_of_sequences():
    """The seed's README says so of its packer, which takes O(N) time and memory."""
    counts = np.bincount(lognormal(10_000))

    def plan(times):
        return sp.pack_length_histogram(counts * times, 2048)

    plan(1)
    small, large = (peak_memory(lambda t=t: plan(t)) for t in (10, 100_000))
    assert large < 2 * small
    assert plan(100_000).num_templates < 2 * plan(10).num_templates


def test_bug_20_the_version_is_that_of_the_package():
    """The seed's 1.0.0 said 0.1.0."""
    assert importlib.metadata.version("seqpack_jax") == sp.__version__


def public_functions():
    """`(module, name, function)` of all that a module's `__all__` names, methods included."""
    for info in pkgutil.walk_packages(sp.__path__, "seqpack_jax."):
        module = importlib.import_module(info.name)
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            members = vars(value).items() if inspect.isclass(value) else [("", value)]
            for member, function in members:
                function = inspect.unwrap(getattr(function, "__func__", function))
                if inspect.isfunction(function) and not member.startswith("_"):
                    yield module, f"{name}.{member}".rstrip("."), function


def test_bug_20_no_parameter_has_the_name_of_a_public_function():
    """The seed's `materialize_epoch(..., shuffle_bins)` hid the function `shuffle_bins`."""
    functions = list(public_functions())
    assert len(functions) > 60
    public = {name for name in sp.__all__ if not inspect.isclass(getattr(sp, name))}
    assert {"shuffle_bins", "permute", "prepare"} <= public
    shadows = []
    for module, name, function in functions:
        hidden = public | {each for other, each, _ in functions if other is module}
        shadows += [(name, each) for each in hidden & set(inspect.signature(function).parameters)]
    assert shadows == []


def test_bug_20_the_files_of_pools_are_as_many_as_shards(tmp_path):
    """The seed wrote a small `.npy` for each distinct length."""
    path = write_parquet(tmp_path / "dataset.parquet", n=np.arange(1, 901))
    prepared = sp.prepare(path, tmp_path / "prepared", 1024, length_column="n")
    assert len(np.flatnonzero(prepared.counts)) == 900
    files = sorted(file.name for file in (tmp_path / "prepared" / "pools").iterdir())
    assert [name.split(".", 1)[1] for name in files] == ["ids.npy", "starts.npy"]
    assert len(prepared.manifest["shards"]) == 1


@pytest.mark.parametrize("column", ["n", "doc_id"])
def test_bug_20_nulls_are_refused(tmp_path, column):
    """In the seed a null became a float NaN, and that some integer."""
    columns = {"n": [5, 3, 4], "doc_id": [7, 8, 9]}
    columns[column][1] = None
    path = write_parquet(tmp_path / "dataset.parquet", **columns)
    with pytest.raises(sp.SeqpackError, match=rf"{column}.*null|null.*{column}") as caught:
        sp.prepare(path, tmp_path / "prepared", 10, length_column="n", id_column="doc_id")
    assert "1" in str(caught.value), "the row"
    assert not (tmp_path / "prepared").exists()
