"""Checkpoints of PackedDataset: Grain's handler, both generations of Orbax, with a model beside."""

import asyncio
import json
from functools import cache

import grain
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import orbax.checkpoint.experimental.v1 as ocp1
import pytest
from comparing import equal
from etils import epath
from flax import nnx

import seqpack_jax as sp

CAPACITY = 32
STEPS = 7


def source_of(**options):
    lengths = np.random.default_rng(0).integers(1, CAPACITY, 60)
    sequences = [np.full(n, i + 1, np.int32) for i, n in enumerate(lengths.tolist())]
    return sp.pack_dataset(
        sequences, CAPACITY, **{"batch_size": 4, "seed": 5, "epochs": 2} | options
    )


def iterator_of(workers=0, **options):
    return iter(sp.PackedDataset(source_of(**options), num_workers=workers))


# --- a model and its optimizer beside ---------------------------------------------------------


@nnx.jit
def train_step(model, optimizer, tokens):
    gradients = nnx.grad(lambda model: (model(tokens) ** 2).mean())(model)
    # Adam's bias correction mixes dtypes: it fails where promotion is strict.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        optimizer.update(model, gradients)


class Training:
    """A small model whose every weight depends on every batch, in order."""

    def __init__(self, seed=0):
        rngs = nnx.Rngs(seed)
        self.model = nnx.Sequential(nnx.Linear(CAPACITY, 8, rngs=rngs), nnx.Linear(8, 1, rngs=rngs))
        self.optimizer = nnx.Optimizer(self.model, optax.adam(1e-2), wrt=nnx.Param)

    def state(self):
        """What is saved, as plain dictionaries of arrays."""
        return {
            "model": nnx.to_pure_dict(nnx.state(self.model)),
            "optimizer": nnx.to_pure_dict(nnx.state(self.optimizer)),
        }

    def restore(self, saved):
        for name, part in (("model", self.model), ("optimizer", self.optimizer)):
            state = nnx.state(part)
            nnx.replace_by_pure_dict(state, saved[name])
            nnx.update(part, state)

    def digest(self):
        leaves = jax.tree_util.tree_leaves_with_path(self.state())
        return [(jax.tree_util.keystr(path), np.asarray(leaf).tobytes()) for path, leaf in leaves]


def train(training, iterator, steps=None):
    for step, batch in enumerate(iterator, start=1):
        tokens = batch["tokens"].astype(np.float32) / 60.0
        train_step(training.model, training.optimizer, tokens)
        if step == steps:
            return


@cache
def undisturbed():
    training = Training()
    train(training, iterator_of())
    return training.digest()


WORKERS = [0, pytest.param(2, marks=pytest.mark.slow)]


@pytest.mark.usefixtures("collect_at_the_end")
@pytest.mark.parametrize("workers", WORKERS)
def test_orbax_managers_restore_model_optimizer_and_data(tmp_path, workers):
    training, iterator = Training(), iterator_of(workers)
    train(training, iterator, STEPS)
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        args = {name: ocp.args.StandardSave(part) for name, part in training.state().items()}
        data = grain.checkpoint.CheckpointSave(iterator)
        manager.save(STEPS, args=ocp.args.Composite(**args, data=data))
        next(iterator)  # what comes later is not saved
        manager.wait_until_finished()
    restored, other = Training(seed=1), iterator_of(workers)
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        args = {name: ocp.args.StandardRestore(part) for name, part in restored.state().items()}
        data = grain.checkpoint.CheckpointRestore(other)
        saved = manager.restore(manager.latest_step(), args=ocp.args.Composite(**args, data=data))
        assert saved["data"] is other
    restored.restore(saved)
    train(restored, other)
    assert restored.digest() == undisturbed()


@pytest.mark.usefixtures("collect_at_the_end")
@pytest.mark.parametrize("workers", WORKERS)
def test_orbax_v1_restores_model_optimizer_and_data(tmp_path, workers):
    training, iterator = Training(), iterator_of(workers)
    train(training, iterator, STEPS)
    ocp1.save_checkpointables(tmp_path / "step", {**training.state(), "data": iterator})
    next(iterator)
    restored, other = Training(seed=1), iterator_of(workers)
    saved = ocp1.load_checkpointables(tmp_path / "step", {**restored.state(), "data": other})
    restored.restore(saved)
    train(restored, other)
    assert restored.digest() == undisturbed()


def test_training_depends_on_the_order_of_batches():
    """Else the tests above would prove little."""
    training, iterator = Training(), iterator_of()
    first, second = next(iterator), next(iterator)
    train(training, [second, first, *iterator])
    assert training.digest() != undisturbed()


# --- the files ----------------------------------------------------------------------------------


def test_grains_handler_at_every_step(tmp_path):
    whole = list(source_of())
    iterator, handler = iterator_of(), grain.checkpoint.CheckpointHandler()
    for step in range(len(whole) + 1):
        folder = epath.Path(tmp_path / str(step))
        folder.mkdir()
        handler.save(folder, iterator)
        text = (folder / "process_0-of-1.json").read_text()
        assert json.loads(text) == iterator.get_state()
        assert len(text) < 1000
        restored = iterator_of()
        assert handler.restore(folder, restored) is restored
        equal(list(restored), whole[step:])
        next(iterator, None)


def test_what_was_started_before_it_was_restored(tmp_path):
    """Orbax v1 loads in a background thread; the handler starts to read ahead."""
    whole = list(source_of())
    iterator = iterator_of()
    equal([next(iterator) for _ in range(3)], whole[:3])
    state = iterator.get_state()
    (tmp_path / "process_0-of-1.json").write_text(json.dumps(state))
    restored = iterator_of()
    restored.start_prefetch()
    next(restored)

    async def load():
        await (await restored.load(epath.Path(tmp_path)))

    asyncio.run(load())
    assert restored.get_state() == state
    equal(list(restored), whole[3:])


def test_on_other_hosts_the_state_is_kept_as_json(tmp_path):
    """Grain's handler reads files of as many processes only; the state is one for all of them."""
    hosts = [iterator_of(batch_size=2, shard=(index, 2)) for index in range(2)]
    for host in hosts:
        for _ in range(STEPS):
            next(host)
    state, other = (host.get_state() for host in hosts)
    assert state == other
    (tmp_path / "grain").mkdir()
    for index, host in enumerate(hosts):
        text = json.dumps(host.get_state())
        (tmp_path / "grain" / f"process_{index}-of-2.json").write_text(text)
    with pytest.raises(ValueError, match=r"process_0-of-1.json does not exist"):
        grain.checkpoint.CheckpointHandler().restore(epath.Path(tmp_path / "grain"), iterator_of())

    with ocp.CheckpointManager(tmp_path / "run") as manager:
        manager.save(STEPS, args=ocp.args.Composite(data=ocp.args.JsonSave(state)))
        manager.wait_until_finished()
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        args = ocp.args.Composite(data=ocp.args.JsonRestore())
        saved = manager.restore(STEPS, args=args)["data"]
    ocp1.save_checkpointables(tmp_path / "step", {"data": state})
    assert ocp1.load_checkpointables(tmp_path / "step")["data"] == saved == state
    alone = iterator_of()
    alone.set_state(saved)
    equal(list(alone), list(source_of())[STEPS:])


def test_another_run_is_refused_by_every_way(tmp_path):
    iterator = iterator_of()
    next(iterator)
    (tmp_path / "grain").mkdir()
    handler, folder = grain.checkpoint.CheckpointHandler(), epath.Path(tmp_path / "grain")
    handler.save(folder, iterator)
    with pytest.raises(sp.SeqpackError, match="the state has the seed 5, here it is 6"):
        handler.restore(folder, iterator_of(seed=6))
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        data = grain.checkpoint.CheckpointSave(iterator)
        manager.save(1, args=ocp.args.Composite(data=data))
        manager.wait_until_finished()
        data = grain.checkpoint.CheckpointRestore(iterator_of(seed=6))
        with pytest.raises(sp.SeqpackError, match="the state has the seed 5, here it is 6"):
            manager.restore(1, args=ocp.args.Composite(data=data))
    ocp1.save_checkpointables(tmp_path / "step", {"data": iterator})
    with pytest.raises(KeyError) as raised:  # a NoEntryError of Orbax, from ours
        ocp1.load_checkpointables(tmp_path / "step", {"data": iterator_of(seed=6)})
    assert isinstance(raised.value.__cause__, sp.SeqpackError)
    assert "the state has the seed 5, here it is 6" in str(raised.value.__cause__)
