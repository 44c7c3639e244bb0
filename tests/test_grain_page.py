"""Every Python block of the page on Grain runs, in order, and prints what the page says."""

import re
import subprocess
import sys
from pathlib import Path

import grain
import jax
import numpy as np
import pytest
from test_readme import blocks_of, run, wrong_blocks

import seqpack_jax as sp
from seqpack_jax.feeding.key_styles import KEY_STYLES

PAGE = Path(sp.__file__).with_name("GRAIN.md").read_text()
BLOCKS = blocks_of(PAGE)
MAXTEXT = PAGE[PAGE.index("## MaxText") : PAGE.index("## Workers and memory")]
# What `get_shaped_batch` of MaxText says that its trainer takes.
MAXTEXT_KEYS = {
    f"{name}{suffix}"
    for name in ("inputs", "targets")
    for suffix in ("", "_position", "_segmentation")
}
DOCS = [np.arange(1, n + 1) + 100 * n for n in range(1, 40)]


def test_the_blocks_run_and_print_what_they_say():
    assert len(BLOCKS) == PAGE.count("```python") >= 14
    assert wrong_blocks(BLOCKS) == []


def test_that_check_can_fail():
    code, printed = BLOCKS[1]
    assert wrong_blocks([BLOCKS[0], (code, printed.replace("0", "9", 1))]) == [1]


@pytest.mark.slow
def test_the_script_with_workers_runs(tmp_path):
    (script,) = re.findall(r"```py\n(.*?)```", PAGE, flags=re.DOTALL)
    (tmp_path / "train.py").write_text(script)
    done = subprocess.run(
        [sys.executable, tmp_path / "train.py"], capture_output=True, text=True, timeout=300
    )
    assert (done.stdout, done.returncode) == ("True\n", 0), done.stderr


def test_nothing_is_left_out():
    for style in KEY_STYLES:
        assert f'| `"{style}"` |' in PAGE, style
    for name in set(re.findall(r"sp\.(\w+)", PAGE)):
        assert name in sp.__all__, name


def test_the_lines_are_short():
    assert max(len(line) for line in PAGE.splitlines() if not line.startswith("|")) <= 100


# MaxText.


def config_of(**options):
    config = {
        "max_target_length": 64,
        "global_batch_size_to_load": 8,
        "data_shuffle_seed": 0,
        "num_epoch": 1,
        "max_segments_per_seq": 5,
        "grain_worker_count": 0,
    }
    return config | options


def batches_of(kind, **options):
    """Run the pipelines of the page, and return their batches."""
    namespace = {"grain": grain, "jax": jax, "np": np, "sp": sp}
    code = "\n".join(re.findall(r"^def maxtext_.*?(?=^\S)", MAXTEXT, re.DOTALL | re.MULTILINE))
    exec(code, namespace)
    if kind == "planned":
        lengths = [len(doc) for doc in DOCS]
        return list(namespace["maxtext_train_dataset"](DOCS, lengths, config_of(**options), [0]))
    records = grain.MapDataset.source([{"text": doc} for doc in DOCS])
    stream = records.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    return list(namespace["maxtext_stream"](stream, config_of(**options), 1))


@pytest.mark.parametrize("cap", [5, -1])
@pytest.mark.parametrize("kind", ["planned", "streamed"])
def test_maxtext_gets_its_keys_dtypes_and_shapes(kind, cap):
    batches = batches_of(kind, max_segments_per_seq=cap)
    assert len(batches) >= 2
    for batch in batches:
        assert set(batch) == MAXTEXT_KEYS
        for array in batch.values():
            assert array.dtype == np.int32
            assert array.shape == (8, 64)
        if cap > 0:
            assert batch["inputs_segmentation"].max() <= cap


@pytest.mark.parametrize("kind", ["planned", "streamed"])
def test_maxtext_learns_the_next_token_of_each_document_and_no_other(kind):
    found = []
    for batch in batches_of(kind):
        rows = (
            dict(zip(batch, arrays, strict=True)) for arrays in zip(*batch.values(), strict=True)
        )
        for row in rows:
            segments = row["inputs_segmentation"]
            for k in range(1, segments.max() + 1):
                here = np.flatnonzero(segments == k)
                tokens = row["inputs"][here]
                found.append(tokens.tolist())
                assert row["inputs_position"][here].tolist() == list(range(len(tokens)))
                assert row["targets"][here].tolist() == [*tokens[1:].tolist(), 0]
                learned = row["targets_segmentation"][here] != 0
                assert learned.tolist() == [True] * (len(tokens) - 1) + [False]
            for array in row.values():
                assert not array[segments == 0].any()
    assert sorted(found) == sorted(doc.tolist() for doc in DOCS)


def test_maxtext_makes_global_arrays_of_the_batches():
    # What `_form_global_array` of MaxText's multihost_dataloading.py does, for one process.
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names))
    batch = batches_of("planned")[0]
    for array in batch.values():
        parts = jax.device_put(np.split(array, 1, axis=0), mesh.local_devices)
        whole = jax.make_array_from_single_device_arrays(array.shape, sharding, parts)
        np.testing.assert_array_equal(whole, array)
    weights = batch["targets_segmentation"] != 0
    lasts = (batch["inputs_segmentation"] != 0) & ~weights
    assert lasts.sum() == batch["inputs_segmentation"].max(axis=1).sum()


def test_the_pieces_of_the_page_can_be_run_alone():
    assert run([BLOCKS[0][0], "print(len(docs))"])[1] == "4000\n"
