"""A map over shards on Ray: what it returns, raises, retries and leaves running."""

import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

import seqpack_jax as sp
from seqpack_jax.feeding import preparation
from seqpack_jax.feeding.distributed import ray_map
from seqpack_jax.feeding.inputs import list_shards
from seqpack_jax.feeding.preparation import prepare

# Ray forks to start its processes, of which JAX warns if another test has loaded it.
pytestmark = pytest.mark.filterwarnings(r"ignore:os\.fork\(\) was called:RuntimeWarning")


def content(folder):
    """The bytes of every file below `folder`."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def square(number):
    return number * number


def refuse(number):
    if number == 3:
        raise sp.SeqpackError("docs: shard 3 is bad. Hint: mend it.")
    return number


def break_down(number):
    raise OSError(f"no disk under {number}")


def lose_the_first_worker(marks, number):
    """Die of SIGKILL where no worker has died of this number before."""
    mark = Path(marks) / str(number)
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def count_at_work(marks, number):
    """Return how many tasks are at work now, this one included."""
    mark = Path(marks) / f"at-work-{number}"
    mark.touch()
    time.sleep(0.2)
    at_work = len(list(Path(marks).glob("at-work-*")))
    mark.unlink()
    return at_work


@pytest.mark.slow
def test_ray_prepares_the_same_bytes(tmp_path, monkeypatch):
    """Shards on a Ray of two workers that the map starts, in a pool, and in this process."""
    import ray

    assert not ray.is_initialized()  # `running_ray` comes later in this file
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    lengths = np.random.default_rng(0).integers(1, 100, (4, 500))
    (tmp_path / "lengths").mkdir()
    for number, part in enumerate(lengths):
        parquet.write_table(
            pa.table({"length": part, "id": np.arange(500)[::-1] + 500 * number}),
            tmp_path / "lengths" / f"{number}.parquet",
        )
    on_sigterm = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(preparation, "list_shards", partial(list_shards, max_rows=500))
    engines = {
        "alone": {},
        "pool": {"workers": 2},
        "ray": {"map_shards": ray_map(num_workers=2)},
    }
    for name, engine in engines.items():
        prepared = prepare(
            tmp_path / "lengths",
            tmp_path / name,
            64,
            length_column="length",
            id_column="id",
            over_length="split",
            **engine,
        )
        assert len(prepared.manifest["shards"]) == 4
    assert not ray.is_initialized()
    assert signal.getsignal(signal.SIGTERM) == on_sigterm
    assert content(tmp_path / "alone") == content(tmp_path / "pool")
    assert content(tmp_path / "alone") == content(tmp_path / "ray")


@pytest.fixture(scope="module")
def running_ray():
    """Ray on this machine, started by the program and not by the map."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.mark.slow
def test_every_shard_once(running_ray):
    on_ray = ray_map(num_workers=2)
    assert sorted(on_ray(square, range(10))) == [n * n for n in range(10)]
    assert list(on_ray(square, [])) == []


@pytest.mark.slow
def test_an_error_of_a_task_is_raised_as_it_was(running_ray):
    with pytest.raises(sp.SeqpackError) as caught:
        list(ray_map(num_workers=2)(refuse, range(10)))
    assert type(caught.value) is sp.SeqpackError
    assert str(caught.value) == "docs: shard 3 is bad. Hint: mend it."
    with pytest.raises(OSError, match="no disk under 0"):
        list(ray_map(num_workers=1)(break_down, range(2)))


@pytest.mark.slow
def test_a_lost_worker_is_replaced(running_ray, tmp_path):
    on_ray = ray_map(num_workers=2)
    assert sorted(on_ray(partial(lose_the_first_worker, str(tmp_path)), range(2))) == [0, 1]


@pytest.mark.slow
def test_no_more_tasks_than_workers_are_at_work(running_ray, tmp_path):
    at_work = list(ray_map(num_workers=2)(partial(count_at_work, str(tmp_path)), range(8)))
    assert len(at_work) == 8
    assert max(at_work) <= 2
    by_cpus = list(ray_map(num_cpus=2)(partial(count_at_work, str(tmp_path)), range(6)))
    assert max(by_cpus) <= 2


@pytest.mark.slow
def test_the_ray_of_the_program_goes_on(running_ray):
    results = ray_map(num_workers=2)(square, range(10))
    next(results)
    results.close()
    assert running_ray.is_initialized()
    assert running_ray.get(running_ray.put(7)) == 7


def test_bad_arguments():
    with pytest.raises(sp.SeqpackError, match=r"ray_map: num_workers = 0, .* at least 1"):
        ray_map(num_workers=0)
    for value in (0, -1.0, True, "2"):
        with pytest.raises(sp.SeqpackError, match=r"ray_map: num_cpus = .* positive number"):
            ray_map(num_cpus=value)


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(sp.SeqpackError, match=r"ray is not installed.*seqpack_jax\[ray\]"):
        ray_map()


@pytest.mark.slow
def test_what_is_wrong_with_a_shard_is_said_as_without_ray(running_ray, tmp_path):
    np.save(tmp_path / "lengths.npy", [3, 0, 5])
    messages = []
    for engine in ({}, {"map_shards": ray_map(num_workers=2)}):
        with pytest.raises(sp.SeqpackError) as caught:
            prepare(tmp_path / "lengths.npy", tmp_path / "prepared", 8, **engine)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert "row 1" in messages[0]
