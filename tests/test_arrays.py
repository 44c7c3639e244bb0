"""Arrays in parts read as one; memory maps travel by path, and other arrays by value."""

import os
import pickle
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import seqpack_jax as sp
from seqpack_jax.arrays import (
    ArrayParts,
    GroupedParts,
    MappedArray,
    from_portable,
    map_npz,
    narrow,
    offsets_of,
    save_npz,
    to_portable,
)


@pytest.fixture
def mapped(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(24, dtype=np.uint16).reshape(6, 4))
    return np.load(tmp_path / "a.npy", mmap_mode="r")


@pytest.mark.parametrize(
    "view",
    [
        lambda a: a,
        lambda a: a[2:5],
        lambda a: a[1],
        lambda a: a[2:5][1:],
        lambda a: np.asarray(a)[3:],
        lambda a: a.reshape(-1)[5:9],
        lambda a: a[:0],
    ],
)
def test_a_contiguous_view_is_mapped_again(mapped, view):
    portable = pickle.loads(pickle.dumps(to_portable(view(mapped))))
    assert isinstance(portable, MappedArray)
    again = from_portable(portable)
    assert again.dtype == np.uint16
    assert again.shape == view(mapped).shape
    assert again.tolist() == view(mapped).tolist()
    assert not again.flags.writeable or again.size == 0


@pytest.mark.parametrize("view", [lambda a: a[:, 1], lambda a: a[::2], lambda a: a.astype(int)])
def test_what_is_not_a_piece_of_the_file_travels_by_value(mapped, view):
    assert not isinstance(to_portable(view(mapped)), MappedArray)


def test_changes_of_a_copy_on_write_map_travel(tmp_path):
    np.arange(10, dtype=np.int32).tofile(tmp_path / "raw.bin")
    array = np.memmap(tmp_path / "raw.bin", np.int32, "c")
    array[:] = -7
    assert from_portable(pickle.loads(pickle.dumps(to_portable(array)))).tolist() == [-7] * 10


def test_an_offset_map_and_a_plain_array(tmp_path):
    path = tmp_path / "raw.bin"
    np.arange(1000, dtype=np.int32).tofile(path)
    array = np.memmap(path, np.int32, "r", offset=400, shape=(500,))[100:]
    assert from_portable(to_portable(array)).tolist() == list(range(200, 600))
    plain = np.arange(3)
    assert from_portable(to_portable(plain)) is plain


def test_narrow_takes_the_smallest_dtype():
    for value, dtype in [(255, np.uint8), (256, np.uint16), (2**16, np.uint32), (2**40, np.uint64)]:
        assert narrow([0, value]).dtype == dtype
        assert narrow([0, value]).tolist() == [0, value]
    assert narrow([]).shape == (0,)


@st.composite
def parts(draw):
    """`(ArrayParts, the same put together)`: some parts empty, of different dtypes, or rows."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    row = draw(st.sampled_from([(), (3,)]))
    sizes = draw(st.lists(st.sampled_from([0, 1, 2, 7]), max_size=8))
    dtypes = rng.choice([np.uint8, np.int32, np.int64, np.uint64], len(sizes))
    arrays = [rng.integers(0, 200, (n, *row)).astype(t) for n, t in zip(sizes, dtypes, strict=True)]
    if not row and draw(st.booleans()):
        arrays = [
            each if k % 2 else range(9, 9 + 3 * len(each), 3) for k, each in enumerate(arrays)
        ]
    bases = rng.integers(-(10**12), 10**12, len(sizes)) if draw(st.booleans()) else None
    shift = np.zeros(len(sizes), np.int64) if bases is None else bases
    whole = [np.array(array, np.int64) + b for array, b in zip(arrays, shift, strict=True)]
    return ArrayParts(arrays, bases), np.concatenate(
        [np.zeros((0, *(row if sizes else ())), int), *whole]
    )


@given(made=parts(), data=st.data())
def test_parts_read_as_one_array(made, data):
    array, whole = made
    size = len(whole)
    assert len(array) == size
    ends = st.none() | st.integers(-size - 2, size + 2)
    step = st.none() | st.sampled_from([1, 2, -1, -3])
    taken = data.draw(st.builds(slice, ends, ends, step))
    assert array[taken].tolist() == whole[taken].tolist()
    assert array[:].dtype == array[[]].dtype == np.int64
    if size:
        shape = data.draw(st.sampled_from([(), (1,), (20,), (4, 5)]))
        index = np.random.default_rng(size).integers(-size, size, shape)
        assert array[index].shape == whole[index].shape
        assert array[index].tolist() == whole[index].tolist()
        assert array[index % size].tolist() == whole[index].tolist()
    for place in (size, -size - 1):
        with pytest.raises(IndexError, match=f"place {place} of {size}"):
            array[[place]]
    again = pickle.loads(pickle.dumps(array))
    assert again[:].tolist() == whole.tolist()


def test_many_parts():
    array = ArrayParts([np.array([k]) for k in range(70_000)])
    assert array[[69_999, 3, 69_999, 300]].tolist() == [69_999, 3, 69_999, 300]


def test_parts_refuse_what_is_no_place():
    array = ArrayParts([np.arange(3), np.arange(4)])
    for index in ([True] * 7, [0.5], "a", None):
        with pytest.raises(IndexError, match="not an integer dtype"):
            array[index]
    with pytest.raises(TypeError, match="read by slices"):
        iter(array)


def test_parts_that_do_not_fit_together():
    rows = np.zeros((2, 3), int)
    with pytest.raises(sp.SeqpackError, match=r"part 1 has dtype int64 and shape \(2, 3\)"):
        ArrayParts([np.arange(3), rows])
    with pytest.raises(sp.SeqpackError, match="part 0 has dtype float64"):
        ArrayParts([np.zeros(3)])
    with pytest.raises(sp.SeqpackError, match=r"2 parts, and bases of shape \(1,\)"):
        ArrayParts([rows, rows], bases=[5])
    with pytest.raises(sp.SeqpackError, match="bases has dtype float64"):
        ArrayParts([rows], bases=[0.7])
    with pytest.raises(sp.SeqpackError, match="bases holds 9223372036854775808, beyond int64"):
        ArrayParts([rows], bases=[2**63])
    with pytest.raises(sp.SeqpackError, match=r"part 1 has dtype int64 and shape \(4,\)"):
        ArrayParts([rows, range(4)])
    for part in (range(2**62, 2**62), range(2**70), range(0, 5, 2**70), range(-(2**63), 0)):
        with pytest.raises(sp.SeqpackError, match=r"part 0 is range\(.* inside 2\*\*62"):
            ArrayParts([part])


@pytest.mark.parametrize("index", [slice(None), [1, 0]])
def test_unsigned_ids_stay_exact(index):
    array = ArrayParts([np.array([2**53 + 1], np.uint64), np.array([7], np.uint64)], bases=[1, 0])
    assert sorted(array[index].tolist()) == [7, 2**53 + 2]
    array = ArrayParts([np.array([5]), np.array([2**63 + 1], np.uint64)])
    assert array[:1].tolist() == [5]
    with pytest.raises(sp.SeqpackError, match="part 1 holds 9223372036854775809, beyond int64"):
        array[index]


def test_a_range_takes_no_memory():
    array = ArrayParts([range(10**12), range(5, -5, -2)], bases=[3, 10**13])
    assert array[[0, 10**12 - 1, -1]].tolist() == [3, 10**12 + 2, 10**13 - 3]
    assert array[10**12 - 1 : 10**12 + 2].tolist() == [10**12 + 2, 10**13 + 5, 10**13 + 3]
    data = pickle.dumps(array)
    assert len(data) < 1000
    assert pickle.loads(data)[[0, -2]].tolist() == [3, 10**13 - 1]


def test_files_behind_links_and_with_odd_names(tmp_path):
    """`link/../b` is not `b`: no path may be changed as text."""
    for folder in ("a/deep", "a/b", "b"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a/deep")
    odd = os.fsencode(tmp_path) + b"/b/\xff\xfe.npy"
    for value, path in enumerate([tmp_path / "a/deep/x.npy", tmp_path / "b/y.npy", odd]):
        with open(path, "wb") as file:
            np.save(file, np.full(3, value))
    np.save(tmp_path / "a" / "b" / "y.npy", np.full(3, 9))
    paths = [str(tmp_path / "link/x.npy"), str(tmp_path / "b/y.npy"), os.fsdecode(odd)]
    maps = [np.load(path, mmap_mode="r") for path in paths]
    for order in ([0, 1, 2], [2, 1, 0], [0, 1], [2], [1]):
        array = ArrayParts([maps[k] for k in order])
        again = pickle.loads(pickle.dumps(array))
        assert again[:].tolist() == [k for k in order for _ in range(3)]
        assert isinstance(again.parts[0], np.memmap)
    save_npz(tmp_path / "a" / "z.npz", {"z": np.arange(4)})
    save_npz(tmp_path / "z.npz", {"z": np.arange(4) + 90})
    mapped = map_npz(f"{tmp_path}/link/../z.npz", ["z"])["z"]
    assert mapped.tolist() == [0, 1, 2, 3]
    assert from_portable(pickle.loads(pickle.dumps(to_portable(mapped)))).tolist() == [0, 1, 2, 3]


def test_parts_of_files_pickle_by_path(tmp_path):
    (tmp_path / "b").mkdir()
    arrays = [np.arange(k, k + n) for k, n in enumerate([3000, 0, 2000, 5])]
    paths = [tmp_path / name for name in ("0.npy", "b/1.npy", "b/2 3.npy")]
    for path, values in zip(paths, arrays, strict=False):
        np.save(path, values)
    maps = [np.load(path, mmap_mode="r") for path in paths]
    array = ArrayParts([*maps, arrays[3], maps[0][7:9]], bases=[1, 2, 3, 4, 5])
    whole = array[:].tolist()
    for _ in range(3):  # what was unpickled is pickled by path again
        data = pickle.dumps(array)
        assert len(data) < 1500
        array = pickle.loads(data)
        assert array[:].tolist() == whole
        assert isinstance(array.parts[0], np.memmap)
    thousand = ArrayParts([np.asarray(maps[0])[k : k + 9] for k in range(1000)])
    assert len(pickle.dumps(thousand)) < 20_000


@given(
    seed=st.integers(0, 2**32),
    keys=st.lists(st.sampled_from([0, 1, 3, 12, 300]), max_size=6),
    densest=st.sampled_from([1, 2, 5]),
)
def test_grouped_parts_are_found_in_as_if_merged(seed, keys, densest):
    rng = np.random.default_rng(seed)
    counts = [rng.integers(0, densest + 1, number) * rng.integers(0, 2, number) for number in keys]
    grouped = GroupedParts([offsets_of(each) for each in counts])
    labels = [
        (k, part) for part, each in enumerate(counts) for k in np.repeat(np.arange(len(each)), each)
    ]
    merged = sorted(range(len(labels)), key=labels.__getitem__)
    for found in (grouped, pickle.loads(pickle.dumps(grouped))):
        assert found.places(np.arange(len(labels))).tolist() == merged
        assert found.sizes.tolist() == [int(each.sum()) for each in counts]
        number = max(keys, default=0)
        total = sum(
            (np.pad(each, (0, number - len(each))) for each in counts), np.zeros(number, int)
        )
        assert found.starts.tolist() == offsets_of(total).tolist()


def test_more_than_65536_keys():
    starts = offsets_of(np.ones(70_000, int))
    grouped = GroupedParts(np.stack([starts, starts]))
    assert grouped.places([0, 1, 139_998, 139_999]).tolist() == [0, 70_000, 69_999, 139_999]


@pytest.mark.parametrize("starts", [[], [1, 2], [0, 3, 2]])
def test_starts_that_do_not_rise_from_zero(starts):
    grouped = GroupedParts([np.array([0, 2]), np.array(starts, int)])
    with pytest.raises(sp.SeqpackError, match="the starts of part 1 do not rise from 0"):
        grouped.places([0])


def test_maps_inside_a_file(tmp_path):
    arrays = {
        "some_long_name": np.arange(7, dtype=np.int32),
        "b": np.arange(6).reshape(3, 2).T,
        "empty": np.zeros((0, 4), np.uint8),
        "text": np.array("text"),
        "last": np.arange(9),
    }
    path = tmp_path / "a.npz"
    save_npz(path, arrays)
    with np.load(path) as file:
        assert {name: file[name].tolist() for name in file} == {
            name: array.tolist() for name, array in arrays.items()
        }
    mapped = map_npz(path, ["last", "some_long_name", "b", "empty"])
    for name, array in mapped.items():
        assert array.tolist() == arrays[name].tolist()
        assert array.dtype == arrays[name].dtype
        if name != "empty":
            assert array.__array_interface__["data"][0] % 64 == 0, "aligned"
            assert isinstance(to_portable(array), MappedArray)
    save_npz(tmp_path / "again.npz", arrays)
    assert (tmp_path / "again.npz").read_bytes() == path.read_bytes()


def test_files_that_cannot_be_mapped(tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, a=np.arange(3))
    with pytest.raises(ValueError, match="a is compressed"):
        map_npz(path, ["a"])
    np.savez(path, a=np.arange(3.0), b=np.array([{}], object))
    with pytest.raises(ValueError, match="a has dtype float64"):
        map_npz(path, ["a"])
    with pytest.raises(ValueError, match="b has dtype object"):
        map_npz(path, ["b"])
    with pytest.raises(KeyError):
        map_npz(path, ["c"])
    np.savez(path, a=np.arange(6).reshape(2, 3).T)
    with pytest.raises(ValueError, match="stored by columns"):
        map_npz(path, ["a"])
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a.npy", b"\x93NUMPY\x02\x00" + bytes(50))
    with pytest.raises(ValueError, match=r"version \(2, 0\) is not known"):
        map_npz(path, ["a"])
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a.npy", b"\x93NUMPY\x01\x00\x01\x00(" + bytes(50))
    with pytest.raises(ValueError, match="a has a bad header"):
        map_npz(path, ["a"])
