"""Plans: their invariants, their checks, and what is saved."""

import dataclasses
import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from strategies import algorithms, histograms, packings

import seqpack_jax as sp


@pytest.fixture
def plan():
    return sp.pack_length_histogram({5: 5, 3: 3, 7: 1}, 10)


@given(histogram=histograms(), algorithm=algorithms)
def test_figures_of_a_plan(histogram, algorithm):
    counts, capacity = histogram
    plan = sp.pack_length_histogram(counts, capacity, algorithm=algorithm)
    counter = plan.to_counter()
    assert plan.num_bins == sum(counter.values())
    assert plan.num_sequences == sum(len(t) * m for t, m in counter.items()) == counts.sum()
    assert plan.num_tokens == sum(sum(t) * m for t, m in counter.items())
    assert plan.max_segments == max(map(len, counter), default=0)
    assert all(list(t) == sorted(t, reverse=True) for t in counter)
    assert 0 < plan.efficiency <= 1
    again = sp.PackingPlan.from_counter(counter, capacity)
    assert again.to_counter() == counter
    backwards = dict(reversed(counter.items()))
    assert sp.PackingPlan.from_counter(backwards, capacity).digest() == again.digest()


@given(packing=packings(), algorithm=algorithms)
def test_slots_use_every_rank_of_every_pool_once(packing, algorithm):
    lengths, capacity = packing
    counts = np.bincount(lengths, minlength=1) if lengths else np.zeros(1, int)
    plan = sp.pack_length_histogram(counts, capacity, algorithm=algorithm)
    used = []
    for template in range(plan.num_templates):
        for slot in range(plan.offsets[template], plan.offsets[template + 1]):
            for b in range(plan.multiplicity[template]):
                used.append((int(plan.lengths[slot]), int(plan.slot_starts[slot] + b)))
    assert sorted(used) == [(n, r) for n in range(len(counts)) for r in range(counts[n])]


def test_a_billion_equal_sequences_are_one_template():
    plan = sp.pack_length_histogram({512: 10**9}, 2048)
    assert plan.to_counter() == {(512, 512, 512, 512): 250_000_000}
    assert plan.efficiency == 1.0
    assert str(plan.certificate).endswith("optimal")


def test_a_certificate_says_when_nothing_is_proved():
    plan = sp.pack_length_histogram({3: 2, 2: 4}, 7)  # 3 + 2 + 2 twice would do
    assert not plan.certificate.proved_optimal
    assert str(plan.certificate) == "3 rows; lower bound 2 (volume): at most 1 too many"


def test_an_empty_plan():
    plan = sp.pack_length_histogram({}, 8)
    plan.check([0])
    assert (plan.num_bins, plan.num_sequences, plan.num_tokens) == (0, 0, 0)
    assert plan.efficiency == 1.0
    assert plan.to_counter() == {}


def change(plan, **fields):
    arrays = {k: np.asarray(v) if isinstance(v, list) else v for k, v in fields.items()}
    return dataclasses.replace(plan, **arrays)


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"multiplicity": [1, 0, 1, 1]}, "multiplicity[1] = 0"),
        ({"lengths": [7, 3, 5, 5, 5, 0, 3]}, "lengths[5] = 0"),
        ({"lengths": [3, 7, 5, 5, 5, 3, 3]}, "lengths[0] is below its successor"),
        ({"lengths": [7, 4, 5, 5, 5, 3, 3]}, "template 0 holds 11 tokens of 10"),
        ({"multiplicity": [2**61] * 4}, "beyond the limit of 2**62"),
        ({"num_tokens": 42}, "num_tokens = 42, the templates hold 41"),
        ({"num_tokens": 40}, "num_tokens = 40, the templates hold 41"),
        ({"tolerance": 0}, "tolerance = 0"),
        ({"tolerance_rows": 1}, "tolerance_rows = 1, at tolerance 1"),
        ({"tolerance_rows": 6, "tolerance": 2}, "tolerance_rows = 6, at tolerance 2 and 5 bins"),
        ({"tolerance_rows": 0.5}, "tolerance_rows = 0.5 is not an integer"),
        ({"lengths": [7.0, 3, 5, 5, 5, 3, 3]}, "lengths has dtype float64"),
        ({"multiplicity": [[2, 1], [1, 1]]}, "multiplicity has shape (2, 2)"),
        ({"offsets": [0, 2, 2, 6, 7]}, "offsets do not cut"),
        ({"offsets": [0, 2, 4, 6]}, "offsets do not cut"),
        ({"offsets": [0, 2, 4, 6, 8]}, "offsets do not cut"),
    ],
)
def test_check_sees_damage(plan, fields, part):
    with pytest.raises(sp.SeqpackError, match="Hint") as caught:
        change(plan, **fields).check()
    assert part in str(caught.value)


def test_check_compares_with_the_counts(plan):
    plan.check({5: 5, 3: 3, 7: 1})
    with pytest.raises(sp.SeqpackError, match="3 slots of length 3 for 4 sequences"):
        plan.check({5: 5, 3: 4, 7: 1})
    with pytest.raises(sp.SeqpackError, match="1 slots of length 7 for 0 sequences"):
        plan.check({5: 5, 3: 3})
    with pytest.raises(sp.SeqpackError, match="0 slots of length 9 for 2 sequences"):
        plan.check({5: 5, 3: 3, 7: 1, 9: 2})
    coarse = sp.pack_length_histogram({3: 2, 4: 2}, 8, tolerance=4)
    with pytest.raises(sp.SeqpackError, match="plan is for 14 tokens, the counts have 13"):
        coarse.check({3: 3, 4: 1})


@pytest.mark.parametrize("mmap", [False, True])
def test_a_changed_byte_never_loads_as_another_plan(plan, tmp_path, mmap):
    path = tmp_path / "plan.npz"
    plan.save(path)
    whole = path.read_bytes()
    loaded = 0
    for byte in range(0, len(whole), 7):
        data = bytearray(whole)
        data[byte] ^= 0x10
        path.unlink()  # or the maps of the last round would change
        path.write_bytes(data)
        try:
            again = sp.PackingPlan.load(path, mmap=mmap)
        except sp.SeqpackError:
            continue
        loaded += 1
        assert again.digest() == plan.digest()
        assert again.certificate == plan.certificate
        assert again.tolerance_rows == plan.tolerance_rows
    assert loaded < len(whole) / 7, "most bytes count"


def test_a_mapped_plan_travels_by_path(tmp_path):
    counts = np.random.default_rng(0).integers(0, 1000, 2049)
    counts[0] = 0
    plan = sp.pack_length_histogram(counts, 2048, tolerance=3)
    plan.save(tmp_path / "plan.npz")
    mapped = sp.PackingPlan.load(tmp_path / "plan.npz", mmap=True)
    plain = sp.PackingPlan.load(tmp_path / "plan.npz")
    assert len(pickle.dumps(plain)) > 4000
    for _ in range(2):
        for name in ("lengths", "offsets", "multiplicity"):
            array = getattr(mapped, name)
            assert array.tolist() == getattr(plan, name).tolist()
            assert array.dtype == getattr(plan, name).dtype
        assert mapped.digest() == plan.digest() == plain.digest()
        assert mapped.certificate == plain.certificate == plan.certificate
        assert mapped.tolerance_rows == plain.tolerance_rows == plan.tolerance_rows
        mapped.check(counts)
        data = pickle.dumps(mapped)
        assert len(data) < 2000
        mapped = pickle.loads(data)
    mapped.save(tmp_path / "again.npz")
    assert (tmp_path / "again.npz").read_bytes() == (tmp_path / "plan.npz").read_bytes()


def test_an_empty_plan_is_mapped_too(tmp_path):
    empty = sp.pack_length_histogram({}, 8)
    empty.save(tmp_path / "plan.npz")
    again = sp.PackingPlan.load(tmp_path / "plan.npz", mmap=True)
    assert again.digest() == pickle.loads(pickle.dumps(again)).digest() == empty.digest()


def test_plans_travel_small(tmp_path):
    lengths = np.clip(np.random.default_rng(0).lognormal(5.7, 1, 200_000), 1, 2048).astype(int)
    large = sp.pack_length_histogram(np.bincount(lengths), 2048)
    assert len(np.unique(lengths)) > 1800
    _ = large.slot_starts, large.bin_starts, large.fills  # derived arrays stay behind
    data = pickle.dumps(large)
    assert len(data) < 100_000
    again = pickle.loads(data)
    assert again.digest() == large.digest()
    assert again.certificate == large.certificate
    assert (again.lengths.dtype, again.offsets.dtype) == (np.int32, np.int64)
    arrays = {name: getattr(large, name) for name in ("lengths", "offsets", "multiplicity")}
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
        arrays[name] = np.load(tmp_path / f"{name}.npy", mmap_mode="r")
    mapped = dataclasses.replace(large, **arrays)
    assert len(pickle.dumps(mapped)) < 2000
    assert pickle.loads(pickle.dumps(mapped)).digest() == large.digest()


def test_from_counter_merges_and_refuses_what_does_not_fit():
    merged = sp.PackingPlan.from_counter({(4, 3): 1, (3, 4): 2}, 8)
    assert merged.to_counter() == {(4, 3): 3}
    with pytest.raises(sp.SeqpackError, match=r"from_counter: 4 is not a template"):
        sp.PackingPlan.from_counter({4: 1}, 8)
    with pytest.raises(sp.SeqpackError, match=r"from_counter: counter\[\(4,\)\] = -1"):
        sp.PackingPlan.from_counter({(4,): -1}, 8)
    assert sp.PackingPlan.from_counter({(4,): 0, (3,): 1}, 8).to_counter() == {(3,): 1}
    with pytest.raises(sp.SeqpackError, match="max_seq_len = 8589934592"):
        sp.PackingPlan.from_counter({(2**32 + 5,): 1}, 2**33)
    with pytest.raises(sp.SeqpackError, match=r"lengths\[0\] = 11"):
        sp.PackingPlan.from_counter({(11,): 1}, 10)
    with pytest.raises(sp.SeqpackError, match="template 0 holds 12 tokens of 10"):
        sp.PackingPlan.from_counter({(4, 8): 1}, 10)
    with pytest.raises(sp.SeqpackError, match="non-empty parts"):
        sp.PackingPlan.from_counter({(): 1}, 10)


@pytest.mark.parametrize(
    ("counter", "part"),
    [
        ([((3,), 1)], "counter is a list"),
        ({"ab": 1}, "'ab' is not a template"),
        ({(4, "a"): 1}, "a length of (4, 'a') = 'a' is not an integer"),
        ({((3,), 2): 1}, "a length of ((3,), 2) = (3,) is not an integer"),
        ({(4, True): 1}, "a length of (4, True) = True is not an integer"),
        ({(4, None): 1}, "a length of (4, None) = None is not an integer"),
        ({(4,): "1"}, "counter[(4,)] = '1' is not an integer"),
        ({(4,): True}, "counter[(4,)] = True is not an integer"),
        ({(4,): [1]}, "counter[(4,)] = [1] is not an integer"),
        ({(4,): 0.0}, "counter[(4,)] = 0.0 is not an integer"),
        ({(4,): 2**64 + 1}, "counter[(4,)] = 18446744073709551617, but it must be in"),
    ],
)
def test_bad_counters(counter, part):
    with pytest.raises(sp.SeqpackError, match=r"^PackingPlan.from_counter: ") as caught:
        sp.PackingPlan.from_counter(counter, 8)
    assert part in str(caught.value)


def test_narrow_counts_do_not_wrap():
    counter = {(4, 3): np.uint8(200), (3, 4): np.uint8(100), (np.int8(4),): np.int8(100)}
    assert sp.PackingPlan.from_counter(counter, 8).to_counter() == {(4, 3): 300, (4,): 100}


def test_numbers_of_a_plan_become_plain_python(plan, tmp_path):
    names = ("max_seq_len", "num_tokens", "tolerance", "tolerance_rows")
    again = change(plan, **{name: np.int64(getattr(plan, name)) for name in names})
    assert repr(again) == repr(plan)
    assert again.digest() == plan.digest()
    paths = [tmp_path / "1.npz", tmp_path / "2.npz"]
    for each, path in zip((plan, again), paths, strict=True):
        each.save(path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    with pytest.raises(sp.SeqpackError, match=r"num_tokens = 41.0 is not an integer"):
        change(plan, num_tokens=41.0).check()


def test_any_tolerance_is_saved(tmp_path):
    counts = {5: 5, 3: 3, 7: 1}
    huge = sp.pack_length_histogram(counts, 10, tolerance=2**70)
    huge.check(counts)
    huge.save(tmp_path / "plan.npz")
    again = sp.PackingPlan.load(tmp_path / "plan.npz")
    assert again.digest() == huge.digest()
    again.check(counts)
    assert again.to_counter() == sp.pack_length_histogram(counts, 10, tolerance=10).to_counter()


def test_digests_differ_with_the_plan(plan):
    digests = {
        plan.digest(),
        sp.pack_length_histogram({5: 5, 3: 3, 7: 1}, 11).digest(),
        sp.pack_length_histogram({5: 5, 3: 3, 7: 2}, 10).digest(),
        sp.pack_length_histogram({5: 5, 3: 3, 7: 1}, 10, tolerance=2).digest(),
        sp.pack_length_histogram({5: 5, 3: 3, 7: 1}, 10, max_segments=1).digest(),
    }
    assert len(digests) == 5


def test_the_digest_is_the_same_in_another_process_and_for_any_order_of_a_mapping(plan):
    code = (
        "import seqpack_jax as sp;print(sp.pack_length_histogram({7: 1, 3: 3, 5: 5}, 10).digest())"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == plan.digest()
    # Golden: a digest that changes would orphan every checkpoint.
    assert plan.digest() == "156c094ee91a86e057f865d082741f6e"


def test_save_and_load(plan, tmp_path):
    plan.save(tmp_path / "plan.npz")
    again = sp.PackingPlan.load(tmp_path / "plan.npz")
    assert again.digest() == plan.digest()
    assert again.certificate == plan.certificate
    assert again.to_counter() == plan.to_counter()
    again.save(tmp_path / "again.npz")
    assert (tmp_path / "plan.npz").read_bytes() == (tmp_path / "again.npz").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.npz", "plan.npz"]


@pytest.mark.parametrize("mmap", [False, True])
def test_a_damaged_file_is_an_error(plan, tmp_path, mmap):
    path = tmp_path / "plan.npz"
    with pytest.raises(sp.SeqpackError, match="does not exist"):
        sp.PackingPlan.load(path, mmap=mmap)
    plan.save(path)
    whole = path.read_bytes()
    for size in range(0, len(whole), 97):
        path.write_bytes(whole[:size])
        with pytest.raises(sp.SeqpackError, match="not a saved plan"):
            sp.PackingPlan.load(path, mmap=mmap)
    path.write_bytes(whole)
    with np.load(path) as file:
        fields = dict(file)
    for name, value, part in [
        ("multiplicity", fields["multiplicity"] + 1, "num_tokens = 41, the templates hold 72"),
        ("digest", np.array("0" * 32), "says digest 0000"),
        ("head", fields["head"] + [1, 0, 0, 0, 0], "has format 2, not 1"),
        ("head", fields["head"][:1] + 1, "has format 2, not 1"),
        ("head", fields["head"][:-1], "not a saved plan"),
        ("head", fields["head"] + [0, 0, 0, 0, 9], "tolerance_rows = 9, at tolerance 1"),
        ("lengths", fields["lengths"].astype(float), "not a saved plan"),
        ("lengths", fields["lengths"].astype(np.int64), "not a saved plan"),
        ("multiplicity", fields["multiplicity"][None], "multiplicity has shape"),
        ("offsets", np.array(3), "offsets has shape"),
        ("bound", np.arange(3), "not a saved plan"),
        ("bound", np.array(6), "lower bound 6 for 5 bins"),
        ("bound", np.array(-4), "lower bound -4 for 5 bins"),
        ("lengths", fields["lengths"][[1, 0, 2, 3, 4, 5, 6]], "below its successor"),
    ]:
        np.savez(path, **{**fields, name: value})
        with pytest.raises(sp.SeqpackError, match=part):
            sp.PackingPlan.load(path, mmap=mmap)
    for name in fields:
        np.savez(path, **{key: value for key, value in fields.items() if key != name})
        with pytest.raises(sp.SeqpackError, match="not a saved plan"):
            sp.PackingPlan.load(path, mmap=mmap)
    np.savez(path, lengths=fields["lengths"])
    with pytest.raises(sp.SeqpackError, match="not a saved plan"):
        sp.PackingPlan.load(path, mmap=mmap)
