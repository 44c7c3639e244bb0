"""What the processes of `test_hosts.py` run: `two_processes.py PORT PROCESS COUNT FOLDER ...`.

Every process trains a tiny model on its rows of packed batches.  With one process there are two
devices all the same, so that the computation, and thus every bit of it, is that of two processes.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import seqpack_jax as sp
from seqpack_jax.feeding.hosts import check_processes, make_global_batch, row_shard
from seqpack_jax.feeding.resuming import PackedDataset

L, ROWS, VOCABULARY, WIDTH = 32, 8, 50, 8  # ROWS of a global batch


def start(port, process, count):
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_num_cpu_devices", 2 // count)
    if count > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", count, process, initialization_timeout=60)
    assert (jax.process_index(), jax.process_count()) == (process, count)


def sequences():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(2.2, 0.6, 200), 1, L).astype(int)
    return [rng.integers(1, VOCABULARY, n) for n in lengths]


def source_of(shard, seed):
    return sp.pack_dataset(
        sequences(), L, batch_size=ROWS // shard[1], seed=seed, epochs=2, shard=shard
    )


def initial():
    rng = np.random.default_rng(1)
    shapes = {"tokens": (VOCABULARY, WIDTH), "positions": (L, WIDTH), "out": (WIDTH, VOCABULARY)}
    return {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}


def loss_of(params, batch):
    """Mean cross entropy of the next token inside each segment."""
    hidden = jnp.take(params["tokens"], batch["tokens"], axis=0)
    hidden = jnp.tanh(hidden + jnp.take(params["positions"], batch["positions"], axis=0))
    scores = jax.nn.log_softmax(hidden @ params["out"])[:, :-1]
    found = jnp.take_along_axis(scores, batch["tokens"][:, 1:, None], axis=-1)[..., 0]
    segments = batch["segment_ids"]
    real = ((segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)).astype(jnp.float32)
    return -(found * real).sum() / real.sum()


@jax.jit
def train_step(params, batch):
    loss, gradients = jax.value_and_grad(loss_of)(params, batch)
    return jax.tree.map(lambda p, g: p - 0.5 * g, params, gradients), loss


def train(mesh, arguments, folder, seed):
    """Train some steps; write losses, the rows of this process, parameters and the position."""
    shard = row_shard((mesh, "data"))
    iterator = iter(PackedDataset(source_of(shard, seed)))
    params = initial()
    if arguments.resume:
        iterator.set_state(json.loads((arguments.resume / "state.json").read_text()))
        params = {name: np.load(arguments.resume / f"{name}.npy") for name in params}
    everywhere = NamedSharding(mesh, PartitionSpec())
    params = jax.jit(lambda: jax.tree.map(jnp.asarray, params), out_shardings=everywhere)()
    losses, rows = [], []
    for _ in range(arguments.steps):
        batch = next(iterator)
        rows.append(batch["tokens"])
        params, loss = train_step(params, make_global_batch(batch, (mesh, "data")))
        losses.append(np.asarray(loss))
    np.save(folder / "losses.npy", losses)
    np.save(folder / "rows.npy", rows)
    for name, value in params.items():
        np.save(folder / f"{name}.npy", value)
    (folder / "state.json").write_text(json.dumps(iterator.get_state()))


def refused(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except sp.SeqpackError as error:
        return str(error)
    return "no error"


def try_shardings():
    """Say what other meshes than that of the training give, for the test to compare."""
    process, devices = jax.process_index(), np.array(jax.devices())
    mine = {"x": np.full((2, 4), process, np.int32)}
    backwards = Mesh(devices[::-1], ("data",)), "data"
    split = NamedSharding(Mesh(devices[None], ("data", "seq")), PartitionSpec("data", "seq"))
    whole = {"x": np.arange(8, dtype=np.int32).reshape(2, 4), "row_valid": np.ones(2, bool)}
    parts = make_global_batch(whole, split, shard=row_shard(split))
    turned = make_global_batch(mine, backwards, shard=row_shard(backwards))["x"]
    (own,) = turned.addressable_shards
    return {
        "backwards": row_shard(backwards),
        "backwards place": own.index[0].start or 0,
        "backwards refused": refused(make_global_batch, mine, backwards),
        "split": row_shard(split),
        "split shapes": {name: array.shape for name, array in parts.items()},
        "split part": np.asarray(parts["x"].addressable_data(0)).tolist(),
        "split refused": refused(make_global_batch, whole, split),
        "equal values": refused(check_processes, {"seed": 2**70, "plan": "abc"}),
        "other values": refused(
            check_processes,
            {"plan": "abc" + "d" * process, "seed": -process, f"only {process}": 1, "same": 5},
            caller="here",
        ),
    }


def main():
    parser = argparse.ArgumentParser()
    for name in ("port", "process", "count"):
        parser.add_argument(name, type=int)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--seeds", type=int, nargs="+", default=[3, 3])
    parser.add_argument("--resume", type=Path)
    arguments = parser.parse_args()
    start(arguments.port, arguments.process, arguments.count)
    folder = arguments.folder / str(arguments.process)
    folder.mkdir(parents=True)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    train(mesh, arguments, folder, arguments.seeds[arguments.process])
    if arguments.count > 1:
        found = try_shardings()
    else:
        odd = {"x": np.zeros((3, L), np.int32)}
        found = {"odd rows": refused(make_global_batch, odd, (mesh, "data"))}
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
