"""The permutation is exact for every n, never changes, and looks random: each claim is measured."""

import hashlib
import itertools
import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqpack_jax import permutation
from seqpack_jax.errors import SeqpackError
from seqpack_jax.permutation import (
    inverse_permute,
    permute,
    random_below,
    seed_from_components,
)

MAX_N = 2**62 - 1
LANES = permutation._LANES
WORD = 2**64 - 1

# (n, seed, index, image), made once.  A failure means: every saved run resumes with other data.
# Do not edit a row without bumping PERMUTATION_VERSION.
GOLDEN = [
    (1, 0, 0, 0),
    (1, 7, 0, 0),
    (1, 18446744073709551615, 0, 0),
    (2, 0, 0, 1),
    (2, 7, 1, 1),
    (2, 18446744073709551615, 1, 0),
    (3, 0, 0, 0),
    (3, 7, 1, 1),
    (3, 18446744073709551615, 2, 1),
    (10, 0, 0, 4),
    (10, 7, 5, 9),
    (10, 18446744073709551615, 9, 5),
    (32, 0, 0, 0),
    (32, 7, 16, 0),
    (32, 18446744073709551615, 31, 8),
    (33, 0, 0, 4),
    (33, 7, 16, 3),
    (33, 18446744073709551615, 32, 16),
    (34, 0, 0, 9),
    (34, 7, 17, 19),
    (34, 18446744073709551615, 33, 14),
    (1000, 0, 0, 599),
    (1000, 7, 500, 866),
    (1000, 18446744073709551615, 999, 120),
    (1024, 0, 0, 738),
    (1024, 7, 512, 415),
    (1024, 18446744073709551615, 1023, 693),
    (1025, 0, 0, 245),
    (1025, 7, 512, 861),
    (1025, 18446744073709551615, 1024, 191),
    (1000000, 0, 0, 668826),
    (1000000, 7, 500000, 164814),
    (1000000, 18446744073709551615, 999999, 466346),
    (1000000007, 0, 0, 618463977),
    (1000000007, 7, 500000003, 311027716),
    (1000000007, 18446744073709551615, 1000000006, 192715026),
    (2147483648, 0, 0, 1430033604),
    (2147483648, 7, 1073741824, 1089169175),
    (2147483648, 18446744073709551615, 2147483647, 1359557528),
    (9007199254740993, 0, 0, 6271361640543145),
    (9007199254740993, 7, 4503599627370496, 4243002942550421),
    (9007199254740993, 18446744073709551615, 9007199254740992, 7753437194594621),
    (2305843009213693951, 0, 0, 83627069039201269),
    (2305843009213693951, 7, 1152921504606846975, 744217137129134209),
    (2305843009213693951, 18446744073709551615, 2305843009213693950, 569663660738551576),
    (4611686018427387903, 0, 0, 4016148479181653388),
    (4611686018427387903, 7, 2305843009213693951, 2234639264215806699),
    (4611686018427387903, 18446744073709551615, 4611686018427387902, 2253955590633340715),
]

SEED_GOLDEN = [
    ((), 16476032584258269876),
    ((0,), 9523843951405948789),
    ((1, 2, 3), 3054663894209944436),
    ((-1,), 2258336317711253734),
    ((WORD, 0), 17685292752062964984),
]


def reference_permute(index, n, seed):
    """The definition, in Python's integers, one index at a time."""

    def mix(word):
        word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & WORD
        word = (word ^ word >> 27) * 0x94D049BB133111EB & WORD
        return word ^ word >> 31

    gamma = 0x9E3779B97F4A7C15
    key = mix(seed + n * gamma & WORD)
    if n <= 32:
        hashes = [mix(key + slot * gamma & WORD) for slot in range(n)]
        return sorted(hashes).index(hashes[index])
    width = math.isqrt(n - 1) + 1
    cell = list(divmod(index, width))  # row, column
    for step in range(12 if n <= 1024 else 8):
        moving, line = (1, 0) if step % 2 == 0 else (0, 1)
        number = cell[line]
        length = min(width, n - number * width) if line == 0 else len(range(number, n, width))
        word = (key + step * gamma + number) * 0xBF58476D1CE4E5B9 & WORD
        word = (word ^ word >> 32) * 0x94D049BB133111EB & WORD
        cell[moving] = (((word >> 32) * length >> 32) - cell[moving]) % length
    return cell[0] * width + cell[1]


def chi_square_z(counts, expected=None):
    """How many sigmas a chi-square statistic lies from its mean (Wilson and Hilferty, 1931)."""
    counts = np.asarray(counts, float).ravel()
    expected = np.full(counts.size, counts.sum() / counts.size) if expected is None else expected
    statistic, df = ((counts - expected) ** 2 / expected).sum(), counts.size - 1
    return ((statistic / df) ** (1 / 3) - (1 - 2 / (9 * df))) / math.sqrt(2 / (9 * df))


def joint_counts(x, y, cells):
    return np.bincount(x * cells + y, minlength=cells * cells).reshape(cells, cells)


def assert_looks_random(z_scores):
    """Five sigmas: a sound generator fails one such test in 10**6, and there are about 10**3."""
    worst = np.max(np.abs(z_scores))
    assert worst < 5, f"the largest of {np.size(z_scores)} z-scores is {worst:.1f}"


def pair_z(n, i, j, seeds, function=permute):
    """Test that (image of i, image of j) is uniform on the pairs of different values."""
    counts = joint_counts(function(i, n, seeds), function(j, n, seeds), n)
    return chi_square_z(counts[~np.eye(n, dtype=bool)])


@st.composite
def problems(draw):
    n = draw(st.one_of(st.integers(1, 100), st.integers(1, MAX_N)))
    return draw(st.integers(0, n - 1)), n, draw(st.integers(-(2**63), WORD))


class TestBijection:
    @pytest.mark.parametrize("seed", [0, 1, -1])
    def test_every_small_n(self, seed):
        for n in range(1, 301):
            image = permute(np.arange(n), n, seed)
            assert sorted(image.tolist()) == list(range(n))
            assert inverse_permute(image, n, seed).tolist() == list(range(n))

    @pytest.mark.parametrize("n", [4**k + d for k in range(4, 12) for d in (-1, 0, 1)])
    def test_around_powers_of_four(self, n):
        """Where the table is square, or a cell more or less (Grain's shuffle fails at 4**k + 1)."""
        image = permute(np.arange(n), n, 7)
        assert image.min() == 0
        assert image.max() == n - 1
        assert (np.bincount(image) == 1).all()
        np.testing.assert_array_equal(inverse_permute(image, n, 7), np.arange(n))

    @given(problems())
    def test_inverse(self, problem):
        index, n, seed = problem
        image = permute(index, n, seed)
        assert 0 <= image < n
        assert inverse_permute(image, n, seed) == index
        assert permute(inverse_permute(index, n, seed), n, seed) == index

    @given(problems())
    def test_equals_the_reference(self, problem):
        index, n, seed = problem
        assert permute(index, n, seed) == reference_permute(index, n, seed)

    def test_square_roots_are_exact(self):
        roots = np.r_[1:2000, 2**26 - 9 : 2**26 + 9, 94906250:94906290, 2**31 - 9 : 2**31]
        n = (roots[:, None] ** 2 + [-1, 0, 1]).ravel()
        n = n[(n > 0) & (n <= MAX_N)].astype(np.uint64)
        expected = [math.isqrt(int(each) - 1) + 1 for each in n]
        assert permutation._ceil_sqrt(n).tolist() == expected


class TestBroadcasting:
    def test_equals_scalar_calls(self):
        sizes = [1, 2, 5, 31, 32, 33, 34, 100, 257, 10**6, 2**31, 10**12, 2**61 - 1, MAX_N]
        seeds = [0, 7, -1, 2**63 - 1]
        index = np.array(sizes)[:, None] // 3
        for function in (permute, inverse_permute):
            image = function(index, np.array(sizes)[:, None], seeds)
            assert image.dtype == np.int64
            assert image.shape == (len(sizes), len(seeds))
            expected = [[function(n // 3, n, seed).item() for seed in seeds] for n in sizes]
            assert image.tolist() == expected

    @pytest.mark.parametrize("size", [1, LANES - 1, LANES, LANES + 1, 2 * LANES + 3])
    @pytest.mark.parametrize("function", [permute, inverse_permute])
    def test_does_not_depend_on_how_a_call_is_split(self, function, size):
        rng = np.random.default_rng(size)
        n = np.exp(rng.uniform(0, 42, size)).astype(np.int64)
        index, seed = rng.integers(0, n), rng.integers(0, WORD, size, np.uint64, endpoint=True)
        cut = size // 3
        parts = [function(index[s], n[s], seed[s]) for s in (slice(cut), slice(cut, None))]
        np.testing.assert_array_equal(function(index, n, seed), np.concatenate(parts))
        alike = np.full(size, 1000), np.full(size, 5)
        np.testing.assert_array_equal(
            function(index % 1000, *alike), function(index % 1000, 1000, 5)
        )

    def test_scalars_give_a_scalar(self):
        assert type(permute(3, 5, 1)) is np.int64
        assert type(inverse_permute(np.int8(3), np.array(5), np.uint64(1))) is np.int64

    def test_empty_arrays(self):
        assert permute([], 5, 1).tolist() == []
        assert permute(np.zeros((0, 3), int), [1, 2, 3], 1).shape == (0, 3)
        assert permute([], [], []).dtype == np.int64

    def test_dtypes_do_not_matter(self):
        expected = permute([0, 50, 99], 100, 7).tolist()
        for dtype in (np.int8, np.uint8, np.int32, np.uint64):
            index = np.array([0, 50, 99], dtype)
            assert permute(index, dtype(100), dtype(7)).tolist() == expected

    @pytest.mark.parametrize("n", [20, 1000])
    def test_seeds_count_modulo_two_to_the_64(self, n):
        index = np.arange(n)
        negative = permute(index, n, -5).tolist()
        assert permute(index, n, 2**64 - 5).tolist() == negative
        assert permute(index, n, np.full(n, -5, np.int8)).tolist() == negative
        assert permute(index, n, np.full(n, 2**64 - 5, np.uint64)).tolist() == negative

    def test_leaves_its_arguments_alone(self):
        index, n, seed = np.arange(100, dtype=np.uint64), np.uint64([100]), np.uint64([3])
        permute(index, n, seed)
        assert (index.tolist(), n.tolist(), seed.tolist()) == (list(range(100)), [100], [3])


def difference_z(n, i, j, seeds):
    """How far the distance between two images is from uniform on 1, ..., n - 1."""
    distance = (permute(j, n, seeds) - permute(i, n, seeds)) % n
    return chi_square_z(np.bincount(distance, minlength=n)[1:])


class TestGolden:
    def test_images_never_change(self):
        assert permutation.PERMUTATION_VERSION == 1
        n, seed, index, image = (list(column) for column in zip(*GOLDEN, strict=True))
        seed = np.array(seed, np.uint64)
        assert permute(index, n, seed).tolist() == image
        assert inverse_permute(image, n, seed).tolist() == index

    @pytest.mark.parametrize("row", GOLDEN)
    def test_reference_never_changes(self, row):
        n, seed, index, image = row
        assert reference_permute(index, n, seed) == image


class TestRandomness:
    def test_image_of_one_index(self):
        seeds = np.arange(40_000)
        assert_looks_random(
            [
                chi_square_z(np.bincount(permute(index, n, seeds), minlength=n))
                for n in range(2, 301)
                for index in {0, n - 1}
            ]
        )

    @pytest.mark.parametrize("n", [10**6, 10**9 + 7, MAX_N])
    def test_image_of_one_index_in_buckets(self, n):
        seeds = np.arange(100_000)
        for index in (0, n // 2, n - 1):
            image = permute(index, n, seeds)
            high = np.floor(image.astype(float) * (100 / n)).astype(int).clip(0, 99)
            assert_looks_random([chi_square_z(np.bincount(each)) for each in (high, image % 128)])

    @pytest.mark.parametrize("n", [2, 3, 4, 5])
    def test_whole_permutations(self, n):
        """All n! orders are equally likely: nothing else can be wrong with a small n."""
        orders = permute(np.arange(n), n, np.arange(100_000)[:, None])
        codes = orders @ n ** np.arange(n)
        expected = [np.dot(order, n ** np.arange(n)) for order in itertools.permutations(range(n))]
        counts = np.array([np.count_nonzero(codes == code) for code in expected])
        assert counts.sum() == len(codes)
        assert_looks_random(chi_square_z(counts))

    @pytest.mark.parametrize("n", [6, 9, 16, 24, 31, 32, 33, 34, 37, 43, 50, 64, 65, 101])
    def test_pairs(self, n):
        """On both sides of the change of method, and where the last row is nearly empty."""
        seeds = np.arange(100_000)
        width = math.isqrt(n - 1) + 1
        pairs = [(0, 1), (0, width), (0, n - 1), (n - 2, n - 1)]
        assert_looks_random([pair_z(n, i, j, seeds) for i, j in pairs])

    @pytest.mark.parametrize("n", [1023, 1024, 1025, 1026, 1057, 1089, 1090])
    def test_differences_inside_pairs(self, n):
        """On both sides of the change in the number of rounds: neighbours of a row, of a column."""
        seeds, width = np.arange(200_000), math.isqrt(n - 1) + 1
        pairs = [(0, 1), (0, width), (5, 5 + 2 * width), (n - 2, n - 1)]
        assert_looks_random([difference_z(n, i, j, seeds) for i, j in pairs])

    @pytest.mark.parametrize("n", [10**4, 10**6, 2**61 - 1])
    def test_no_serial_correlation(self, n):
        """Not between neighbouring indices, neighbouring seeds, nor neighbouring n."""
        seeds, cells = np.arange(100_000), 24

        def cell(image):
            return (image.astype(float) * (cells / n)).astype(int).clip(0, cells - 1)

        base = cell(permute(0, n, seeds))
        others = [permute(1, n, seeds), permute(0, n, seeds + 1), permute(0, n - 1, seeds)]
        assert_looks_random([chi_square_z(joint_counts(base, cell(y), cells)) for y in others])
        z_scores = [np.corrcoef(base, cell(y))[0, 1] * math.sqrt(seeds.size) for y in others]
        assert_looks_random(z_scores)

    @pytest.mark.parametrize("seed", [0, 1, 2])
    def test_no_serial_correlation_inside_one_permutation(self, seed):
        n, cells = 10**6, 32
        image = permute(np.arange(200_000), n, seed)
        cell = image * cells // n
        for lag in (1, 2, 1000):  # the table is 1000 wide
            assert_looks_random(chi_square_z(joint_counts(cell[:-lag], cell[lag:], cells)))
        steps = np.diff(image) % n * cells // n
        assert_looks_random(chi_square_z(np.bincount(steps, minlength=cells)))

    def test_small_n_differ_for_one_seed(self):
        """Pools of nearby sizes that share a seed are shuffled independently."""
        seeds = np.arange(50_000)
        for n in (3, 32, 33):
            counts = np.zeros((n, n + 1))
            np.add.at(counts, (permute(0, n, seeds), permute(0, n + 1, seeds)), 1)
            assert_looks_random(chi_square_z(counts))


class TestChecksCanFail:
    def test_cyclic_shift_is_caught(self):
        """Uniform one index at a time, and yet no shuffle."""
        seeds = np.arange(100_000)

        def shift(index, n, seed):
            return (index + permute(0, n, seed)) % n

        assert_looks_random(chi_square_z(np.bincount(shift(3, 37, seeds))))
        assert pair_z(37, 0, 1, seeds, shift) > 100

    def test_too_narrow_shift_is_caught(self):
        counts = np.bincount((3 + np.arange(40_000) % 29) % 30, minlength=30)
        with pytest.raises(AssertionError, match="z-scores"):
            assert_looks_random(chi_square_z(counts))

    def test_too_few_rounds_are_caught(self, monkeypatch):
        """One round fails one index; six rounds pass that, and fail pairs; twelve pass both."""
        seeds = np.arange(100_000)
        monkeypatch.setattr(permutation, "_FIRST_ROUNDS", 1)
        monkeypatch.setattr(permutation, "_ROUNDS", 1)
        assert chi_square_z(np.bincount(permute(0, 37, seeds), minlength=37)) > 100
        monkeypatch.setattr(permutation, "_FIRST_ROUNDS", 6)
        monkeypatch.setattr(permutation, "_ROUNDS", 6)
        assert_looks_random(chi_square_z(np.bincount(permute(0, 37, seeds), minlength=37)))
        assert pair_z(37, 0, 1, seeds) > 5

    def test_too_few_rounds_on_a_large_table_are_caught(self, monkeypatch):
        monkeypatch.setattr(permutation, "_FIRST_ROUNDS", 3)
        assert difference_z(1025, 0, 1, np.arange(200_000)) > 5

    def test_neglected_sorting_is_caught(self, monkeypatch):
        """Twelve rounds alone would not do for a table as small as that of n = 6."""
        monkeypatch.setattr(permutation, "_MAX_SORTED_N", 1)
        assert pair_z(6, 0, 1, np.arange(400_000)) > 5


class TestErrors:
    @pytest.mark.parametrize("function", [permute, inverse_permute])
    @pytest.mark.parametrize(
        ("arguments", "problem"),
        [
            ((12, 10, 1), "index = 12, but it must be in [0, 9] (1 of 1 outside)"),
            ((-1, 10, 1), "index = -1, but it must be in [0, 9]"),
            (([1, 2, 12, -1], 10, 1), "index[2] = 12, but it must be in [0, 9] (2 of 4 outside)"),
            ((5, [9, 3], 0), "index[1] = 5, but it must be in [0, 2] (1 of 2 outside)"),
            (([[1, 2], [3, 4]], [3, 5], 0), "index[1, 0] = 3, but it must be in [0, 2] (1 of 4"),
            ((np.array([WORD], np.uint64), 5, 1), f"index[0] = {WORD}, but it must be in [0, 4]"),
            ((0, 0, 1), f"n = 0, but it must be in [1, {MAX_N}]"),
            ((0, [3, -3], 1), f"n[1] = -3, but it must be in [1, {MAX_N}] (1 of 2 outside)"),
            ((0, 2**62, 1), f"n = {2**62}, but it must be in [1, {MAX_N}]"),
            ((0, 3, 2**64), f"seed = {2**64}, but it must be in [{-(2**63)}, {WORD}]"),
            ((0, 3, -(2**63) - 1), f"seed = {-(2**63) - 1}, but it must be in"),
            ((0, 3, [2**64]), "seed has dtype object, not an integer dtype"),
            ((1.0, 3, 1), "index = 1.0 is not an integer"),
            ((True, 3, 1), "index = True is not an integer"),
            ((0, "3", 1), "n = '3' is not an integer"),
            (([0.5], 3, 1), "index has dtype float64, not an integer dtype"),
            ((0, [True], 1), "n has dtype bool, not an integer dtype"),
            ((0, 3, None), "seed has dtype object, not an integer dtype"),
            (([[1], [1, 2]], 3, 1), "index is ragged"),
            (([1, 2], [3, 4, 5], 1), "the shapes of index (2,), n (3,) and seed () do not broadca"),
        ],
    )
    def test_permute(self, function, arguments, problem):
        with pytest.raises(SeqpackError, match=re.escape(problem)) as error:
            function(*arguments)
        assert str(error.value).startswith(f"{function.__name__}: ")
        assert ". Hint: " in str(error.value)

    @pytest.mark.parametrize("bad", ["1", 1.0, True, None, np.float32(1), np.True_])
    def test_seed_from_components(self, bad):
        with pytest.raises(SeqpackError, match=r"^seed_from_components: components\[1\] = .*Hint"):
            seed_from_components(3, bad)


class TestSeedFromComponents:
    @pytest.mark.parametrize(("components", "seed"), SEED_GOLDEN)
    def test_never_changes(self, components, seed):
        assert seed_from_components(*components) == seed

    @given(st.lists(st.integers(-(2**63), WORD), max_size=5))
    def test_is_the_hash_of_the_joined_decimals(self, components):
        text = ":".join(map(str, components))
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        seed = seed_from_components(*components)
        assert seed == int.from_bytes(digest, "big")
        assert 0 <= permute(0, 10, seed) < 10  # a seed of permute, whatever it is

    def test_numpy_integers_count_as_integers(self):
        assert seed_from_components(np.int8(7), np.uint64(9)) == seed_from_components(7, 9)

    def test_order_and_grouping_count(self):
        seeds = {seed_from_components(*c) for c in [(1, 2), (2, 1), (12,), (1, 2, 0), (1,), ()]}
        assert len(seeds) == 6


def test_random_below_is_splitmix_and_a_multiplication():
    def slow(bound, index, seed):
        word = (seed + index * 0x9E3779B97F4A7C15) % 2**64
        word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        word = (word ^ (word >> 27)) * 0x94D049BB133111EB % 2**64
        return ((word ^ (word >> 31)) >> 32) * bound >> 32

    rng = np.random.default_rng(0)
    bounds, indices = rng.integers(1, 2**32, 500), rng.integers(0, 2**63 - 1, 500)
    for seed in (0, 7, 2**64 - 1):
        expected = [
            slow(*each, seed) for each in zip(bounds.tolist(), indices.tolist(), strict=True)
        ]
        assert random_below(bounds, indices, seed).tolist() == expected
