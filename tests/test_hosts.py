"""Many processes: global batches, and the check that all of them feed the same data."""

import json
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import seqpack_jax as sp
from seqpack_jax.feeding import hosts
from seqpack_jax.feeding.hosts import check_processes, make_global_batch, row_shard

PROGRAM = Path(__file__).with_name("two_processes.py")


def mesh():
    return Mesh(np.array(jax.devices()[:1]), ("data",))


# --- one process --------------------------------------------------------------------------------


def test_one_process_gets_its_rows_on_its_devices():
    rows = np.arange(8, dtype=np.int32).reshape(2, 4)
    nested = {"tokens": rows, "meta": {"weight": rows.astype(np.float32), "ok": rows[:, 0] > 0}}
    for sharding in (
        (mesh(), "data"),
        (mesh(), ("data",)),
        NamedSharding(mesh(), PartitionSpec("data")),
        NamedSharding(mesh(), PartitionSpec("data", None, None)),
        jax.sharding.SingleDeviceSharding(jax.devices()[0]),
    ):
        assert row_shard(sharding) == (0, 1)
        batch = make_global_batch(nested, sharding)
        assert jax.tree.structure(batch) == jax.tree.structure(nested)
        for one, two in zip(jax.tree.leaves(batch), jax.tree.leaves(nested), strict=True):
            assert isinstance(one, jax.Array)
            assert one.dtype == two.dtype
            np.testing.assert_array_equal(one, two)


def test_a_packed_batch_stays_one():
    rows = np.ones((2, 4), np.int32)
    batch = make_global_batch(sp.PackedBatch(rows, rows, rows, {"x": rows}), (mesh(), "data"))
    assert isinstance(batch, sp.PackedBatch)
    assert isinstance(batch.features["x"], jax.Array)


@pytest.mark.parametrize(
    ("dtype", "narrow", "edges"),
    [("int64", "int32", [-(2**31), 2**31 - 1]), ("uint64", "uint32", [0, 2**32 - 1])],
)
def test_wide_integers_are_narrowed_only_if_they_fit(dtype, narrow, edges):
    ids = make_global_batch({"ids": np.array([edges], dtype)}, (mesh(), "data"))["ids"]
    assert ids.dtype == narrow
    assert ids.tolist() == [edges]
    over = {"a": {"ids": np.array([[5, edges[1] + 1]], dtype)}}
    with pytest.raises(sp.SeqpackError, match=f"a/ids holds {edges[1] + 1}, beyond {narrow}"):
        make_global_batch(over, (mesh(), "data"))
    with jax.enable_x64(True):
        kept = make_global_batch(over, (mesh(), "data"))["a"]["ids"]
        assert kept.dtype == dtype
        assert kept.tolist() == [[5, edges[1] + 1]]


def test_a_value_below_int32_is_refused_too():
    with pytest.raises(sp.SeqpackError, match=f"ids holds {-(2**31) - 1}, beyond int32"):
        make_global_batch({"ids": np.array([-(2**31) - 1])}, (mesh(), "data"))


@pytest.mark.parametrize(
    ("batch", "part"),
    [
        ({"w": np.ones(2)}, "w has dtype float64, which JAX would make float32. Hint: cast w"),
        ({"name": np.array(["a"])}, "name has dtype <U1"),
        ({"raw": np.zeros(2, "V8")}, "raw has dtype |V8"),
        ({"x": np.float32(3)}, "x has no axis of rows"),
        (np.int32(3), "the batch has no axis of rows"),
        ({"x": np.ones((2, 3), bool), "y": np.ones(3, bool)}, "x has 2 rows, y has 3"),
    ],
)
def test_what_has_no_place_in_a_global_batch_is_refused(batch, part):
    with pytest.raises(sp.SeqpackError, match="make_global_batch: ") as caught:
        make_global_batch(batch, (mesh(), "data"))
    assert part in str(caught.value)


def test_numbers_of_another_byte_order_and_of_kinds_that_numpy_lacks():
    arrays = {
        "a": np.array([1, -2], ">i4"),
        "b": np.array([3, 2**31 - 1], ">i8"),
        "c": np.array([0.5, 2], ">f4"),
        "d": np.ones(2, jax.numpy.bfloat16),
    }
    batch = make_global_batch(arrays, (mesh(), "data"))
    assert [str(batch[name].dtype) for name in "abcd"] == ["int32", "int32", "float32", "bfloat16"]
    for name, array in arrays.items():
        np.testing.assert_array_equal(batch[name], array)


def test_shardings_that_name_no_rows_are_refused():
    with pytest.raises(sp.SeqpackError, match="sharding = 'data' names no mesh"):
        make_global_batch({}, "data")
    with pytest.raises(sp.SeqpackError, match="row_shard: the mesh has the axes data, no 'rows'"):
        row_shard((mesh(), ("data", "rows")))
    with pytest.raises(sp.SeqpackError, match=r"feeds share \(0, 2\), but .* share \(0, 1\)"):
        make_global_batch({}, (mesh(), "data"), shard=(0, 2))


class Processes:
    """A sharding in which process `p` holds the rows `starts[p]` of as many as there are devices.

    It answers what `row_shard` asks a sharding, for more processes than run here.
    """

    def __init__(self, starts):
        self.starts = starts
        self.device_set = range(sum(map(len, starts)))

    def devices_indices_map(self, shape):
        assert shape == (len(self.device_set),)
        return {
            type("Device", (), {"process_index": process})(): (slice(start or None, start + 1),)
            for process, own in enumerate(self.starts)
            for start in own
        }


@pytest.mark.parametrize(
    ("starts", "share"),
    [
        ([[0, 1], [2, 3]], (0, 2, 4)),
        ([[2, 3], [0, 1]], (1, 2, 4)),
        ([[0, 2], [1, 3]], (0, 2, 4)),
        ([[1, 0], [2, 3], [0, 1], [3, 2]], (0, 2, 4)),
        ([[0, 0], [0, 0]], (0, 1, 1)),
    ],
)
def test_the_share_of_a_process(starts, share):
    assert hosts._share("x", Processes(starts)) == share


@pytest.mark.parametrize("starts", [[[0, 1], [1, 2]], [[0], [1, 2]], [[0, 1], [0]]])
def test_shares_that_overlap_are_refused(starts):
    with pytest.raises(sp.SeqpackError, match="partly the same rows, or more rows"):
        hosts._share("x", Processes(starts))


def test_a_process_without_devices_is_refused():
    with pytest.raises(sp.SeqpackError, match="no device of process 0 is in the sharding"):
        hosts._share("x", type("Nowhere", (Processes,), {})([[], [0, 1]]))


def test_one_process_has_nothing_to_compare():
    check_processes({"seed": np.int64(3), "plan": "x"})
    with pytest.raises(sp.SeqpackError, match=r"seed = 0\.5 is not an integer"):
        check_processes({"seed": 0.5})
    with pytest.raises(sp.SeqpackError, match="the name 3 is no string"):
        check_processes({"seed": 1, 3: 1})


@pytest.mark.parametrize(
    ("one", "two", "problem"),
    [
        ({"a": 5}, {"a": "5"}, "a is 5 on process 0, '5' on process 1"),
        ({"a": "missing"}, {}, "a is 'missing' on process 0, missing on process 1"),
        ({"a": "'x'"}, {"a": "x"}, "a is 'x' on process 0, x on process 1"),
    ],
)
def test_values_that_look_alike_differ(one, two, problem):
    assert hosts._differences([one, two]) == [problem]


def test_long_values_that_differ_are_shortened():
    long = "x" * 10**6
    (problem,) = hosts._differences([{"a": long + "1"}, {"a": long + "2"}, {"a": 10**99}])
    assert len(problem) < 400
    digests = re.findall(r"x{50}\.\.\. \(1000001 characters, sha256 (\w{8})\.\.\.\)", problem)
    assert len(set(digests)) == 2
    assert f"{10**99} on process 2" in problem


def test_differences_name_ranges_of_processes():
    every = [{"seed": 3, "plan": "a"} for _ in range(9)]
    assert hosts._differences(every) == []
    every[4] = {"seed": 4, "plan": "a"}
    every[8] = {"seed": 5}
    assert hosts._differences(every) == [
        "seed is 3 on processes 0-3, 5-7, 4 on process 4, 5 on process 8",
        "plan is a on processes 0-7, missing on process 8",
    ]
    (many,) = hosts._differences([{"seed": seed} for seed in range(6)])
    assert many.endswith("3 on process 3, 2 more values on others")


# --- processes of their own ---------------------------------------------------------------------


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(folder, count, *options):
    """Run `count` processes of the program, and return what each wrote to stderr by exit code."""
    folder.mkdir()
    command = [sys.executable, str(PROGRAM), str(free_port())]
    logs = [folder / f"{process}.log" for process in range(count)]
    running = []
    try:
        for process, log in enumerate(logs):
            arguments = [str(process), str(count), str(folder), *map(str, options)]
            with log.open("w") as file:
                running.append(subprocess.Popen(command + arguments, stdout=file, stderr=file))
        deadline = time.monotonic() + 100
        codes = [one.wait(max(0, deadline - time.monotonic())) for one in running]
    finally:
        for one in running:
            one.kill()
            one.wait()
    return list(zip(codes, (log.read_text() for log in logs), strict=True))


def result(folder, process=0):
    names = ("losses", "rows", "tokens", "positions", "out")
    found = {name: np.load(folder / str(process) / f"{name}.npy") for name in names}
    found |= {
        name: json.loads((folder / str(process) / f"{name}.json").read_text())
        for name in ("state", "found")
    }
    return found


def succeeded(outcomes):
    for code, log in outcomes:
        assert code == 0, log


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Six steps on one process, and three steps on two processes."""
    folder = tmp_path_factory.mktemp("trained")
    succeeded(run(folder / "one", 1, "--steps", 6))
    succeeded(run(folder / "two", 2, "--steps", 3))
    return folder


@pytest.mark.slow
def test_two_processes_train_as_one(trained):
    """To the last bit: the program is the same, partitioned over the same number of devices."""
    whole = result(trained / "one")
    parts = [result(trained / "two", process) for process in range(2)]
    assert whole["losses"].shape == (6,)
    assert len(set(whole["losses"].tolist())) == 6
    np.testing.assert_array_equal(
        np.concatenate([part["rows"] for part in parts], axis=1), whole["rows"][:3]
    )
    for part in parts:
        np.testing.assert_array_equal(part["losses"], whole["losses"][:3])
    for name in ("tokens", "positions", "out"):
        np.testing.assert_array_equal(parts[0][name], parts[1][name])
    assert parts[0]["state"] == parts[1]["state"]


@pytest.mark.slow
def test_saved_on_two_processes_resumed_on_one(trained, tmp_path):
    state = trained / "two" / "0"
    succeeded(run(tmp_path / "resumed", 1, "--steps", 3, "--resume", state))
    whole, rest = result(trained / "one"), result(tmp_path / "resumed")
    np.testing.assert_array_equal(rest["rows"], whole["rows"][3:])
    np.testing.assert_array_equal(rest["losses"], whole["losses"][3:])
    for name in ("tokens", "positions", "out"):
        np.testing.assert_array_equal(rest[name], whole[name])


@pytest.mark.slow
def test_another_seed_stops_both_processes_before_the_first_step(tmp_path):
    outcomes = run(tmp_path / "seeds", 2, "--seeds", 3, 4)
    for process, (code, log) in enumerate(outcomes):
        assert code == 1, log
        assert "PackedDataset: the 2 processes feed different data" in log
        assert "seed is 3 on process 0, 4 on process 1" in log
        assert list((tmp_path / "seeds" / str(process)).iterdir()) == []


@pytest.mark.slow
def test_shardings_over_two_processes(trained):
    for process in range(2):
        found = result(trained / "two", process)["found"]
        # Devices in another order than the processes: the shard follows the rows.
        assert found["backwards"] == [1 - process, 2]
        assert found["backwards place"] == 2 * (1 - process)
        expected = f"process {process} feeds share ({process}, 2), but the sharding takes share"
        assert f"{expected} ({1 - process}, 2)" in found["backwards refused"]
        # Both processes hold all rows, each a half of every sequence.
        assert found["split"] == [0, 1]
        assert found["split shapes"] == {"x": [2, 4], "row_valid": [2]}
        assert found["split part"] == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]][process]
        assert f"{expected} (0, 1)" in found["split refused"]
    odd = result(trained / "one")["found"]["odd rows"]
    assert "the 3 rows of a step do not divide over 2 devices" in odd


@pytest.mark.slow
def test_every_process_is_told_all_differences(trained):
    for process in range(2):
        found = result(trained / "two", process)["found"]
        assert found["equal values"] == "no error"
        assert found["other values"].startswith(
            "here: the 2 processes feed different data: only 0 is 1 on process 0, missing on "
            "process 1; plan is abc on process 0, abcd on process 1; "
            "seed is 0 on process 0, -1 on process 1; only 1 is missing on process 0, 1 on "
            "process 1. Hint: "
        )


@pytest.mark.slow
def test_eight_devices_of_one_process_hold_their_parts_and_copies():
    code = """
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from seqpack_jax.feeding.hosts import make_global_batch, row_shard
jax.config.update("jax_num_cpu_devices", 8)
mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
x = np.arange(48, dtype=np.int32).reshape(8, 6)
batch = {"x": x, "rows": x[:, 0] > 0, "deep": [x[..., None], (x,)]}
cases = {  # rows and columns of each part, and how many devices hold the same one
    (mesh, "data"): (2, 6, 2),
    (mesh, ("data", "model")): (1, 6, 1),
    NamedSharding(mesh, P(("data", "model"), None)): (1, 6, 1),
    NamedSharding(mesh, P("data", "model", None, None)): (2, 3, 1),
    NamedSharding(mesh, P(None, "model")): (8, 3, 4),
    NamedSharding(mesh, P()): (8, 6, 8),
}
for sharding, (rows, columns, copies) in cases.items():
    assert row_shard(sharding) == (0, 1)
    made = make_global_batch(batch, sharding)
    for one, two in zip(jax.tree.leaves(made), jax.tree.leaves(batch), strict=True):
        np.testing.assert_array_equal(one, two)
        for part in one.addressable_shards:
            np.testing.assert_array_equal(part.data, two[part.index])
    shapes = [part.data.shape for part in made["x"].addressable_shards]
    assert shapes == [(rows, columns)] * 8
    places = [str(part.index) for part in made["x"].addressable_shards]
    assert [places.count(place) for place in places] == [copies] * 8
    assert made["rows"].addressable_shards[0].data.shape == (rows,)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.slow
def test_checking_starts_no_backend():
    code = """
import sys
from seqpack_jax.feeding.hosts import check_processes
check_processes({"seed": 3})
assert "jax" not in sys.modules
import jax
check_processes({"seed": 3})
jax.config.update("jax_num_cpu_devices", 3)  # refused once a backend has started
assert jax.device_count() == 3
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
