"""Memory maps travel by path, views of them too, and other arrays by value."""

import pickle

import numpy as np
import pytest

from seqpack_jax.arrays import MappedArray, from_portable, to_portable


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
