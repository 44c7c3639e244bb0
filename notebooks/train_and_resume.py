"""Train a small Flax model on packed text, with checkpoints that survive anything.

    python notebooks/train_and_resume.py --folder /tmp/run --steps 60 --every 5

Kill it at any moment, start it again with the same command, and it goes on behind the last
checkpoint: with the parameters, the state of the optimizer, and the position in the data.  At the
end the parameters are the same to the last bit as those of a run that nobody disturbed; compare
the digest in `result.json`.  The number of workers may be another one each time.
"""

import argparse
import hashlib
import json
from pathlib import Path

import grain
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from absl import flags
from flax import nnx

import seqpack_jax as sp
from seqpack_jax.demo import encode_all
from seqpack_jax.demo_model import DemoModel, packed_loss


def make_text(documents=2000, seed=0):
    """Return documents of one to eight sums, in words of their own."""
    rng = np.random.default_rng(seed)
    texts = []
    for count in rng.integers(1, 9, documents):
        pairs = rng.integers(0, 100, (count, 2)).tolist()
        texts.append(" ".join(f"{a} and {b} are {a + b}." for a, b in pairs))
    return texts


def make_source(batch_size, seed):
    """Return packed batches of the text; more epochs than anybody will wait for."""
    return sp.pack_dataset(
        encode_all(make_text()),
        max_seq_len=128,
        batch_size=batch_size,
        seed=seed,
        epochs=1000,
        over_length="split",
    )


@nnx.jit
def train_step(model, optimizer, batch):
    (loss, _), gradients = nnx.value_and_grad(packed_loss, has_aux=True)(model, batch)
    optimizer.update(model, gradients)
    return loss


def state_of(model, optimizer):
    """Return what a checkpoint keeps beside the data: nested dictionaries of arrays."""
    parts = {"model": model, "optimizer": optimizer}
    return {name: nnx.to_pure_dict(nnx.state(part)) for name, part in parts.items()}


def set_state(module, saved):
    state = nnx.state(module)
    nnx.replace_by_pure_dict(state, saved)
    nnx.update(module, state)


def digest_of(state):
    """Return the SHA-256 of all arrays, their names and their order."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def save(manager, step, model, optimizer, iterator):
    parts = state_of(model, optimizer)
    args = {name: ocp.args.StandardSave(part) for name, part in parts.items()}
    # One file per process.  To go on with other numbers of processes, save the state once, as it is
    # the same everywhere: data=ocp.args.JsonSave(iterator.get_state()).
    data = grain.checkpoint.CheckpointSave(iterator)
    manager.save(step, args=ocp.args.Composite(**args, data=data))


def restore(manager, model, optimizer, iterator):
    """Go to the last checkpoint; return its step, 0 if there is none."""
    step = manager.latest_step()
    if step is None:
        return 0
    parts = state_of(model, optimizer)
    args = {name: ocp.args.StandardRestore(part) for name, part in parts.items()}
    data = grain.checkpoint.CheckpointRestore(iterator)
    saved = manager.restore(step, args=ocp.args.Composite(**args, data=data))
    set_state(model, saved["model"])
    set_state(optimizer, saved["optimizer"])
    return step


def train(folder, steps, every, workers, batch_size=4, seed=0):
    """Train until `steps` steps are done, all runs counted; return the digest of the result."""
    model = DemoModel(nnx.Rngs(seed), width=32, layers=1)
    optimizer = nnx.Optimizer(model, optax.adamw(3e-3), wrt=nnx.Param)
    iterator = iter(sp.PackedDataset(make_source(batch_size, seed), num_workers=workers))
    options = ocp.CheckpointManagerOptions(max_to_keep=2, save_interval_steps=every)
    with ocp.CheckpointManager(folder / "checkpoints", options=options) as manager:
        first = restore(manager, model, optimizer, iterator)
        print(f"begin after step {first}", flush=True)
        for step in range(first + 1, steps + 1):
            loss = train_step(model, optimizer, next(iterator))
            print(f"step {step} loss {float(loss):.4f}", flush=True)
            if step % every == 0:
                save(manager, step, model, optimizer, iterator)
    iterator.close()
    return digest_of(state_of(model, optimizer))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="of checkpoints and result")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=5, help="steps between checkpoints")
    parser.add_argument("--workers", type=int, default=0, help="processes that read and pack")
    options = parser.parse_args()
    flags.FLAGS.mark_as_parsed()  # Grain's workers read absl flags
    folder = options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    digest = train(folder, options.steps, options.every, options.workers)
    result = {"steps": options.steps, "digest": digest}
    (folder / "result.json").write_text(json.dumps(result) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
