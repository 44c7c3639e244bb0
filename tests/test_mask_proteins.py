"""The protein example: what is masked, how often, by (seed, epoch, id) and nothing else."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqpack_jax.feeding.resuming import PackedDataset

PATH = Path(__file__).parents[1] / "notebooks" / "mask_proteins.py"
spec = importlib.util.spec_from_file_location("mask_proteins", PATH)
example = importlib.util.module_from_spec(spec)
spec.loader.exec_module(example)

L = 256
PROTEINS = example.synthetic_proteins(120, L - 2)


def source_of(**options):
    options = {"batch_size": 4, "seed": 3, "epochs": 2, "metadata": True} | options
    return example.pack_proteins(PROTEINS, L, **options)


def masks(batches):
    """What became of each protein: `{id: (tokens, labels)}`, special tokens included."""
    found = {}
    for batch in batches:
        for row, ids in enumerate(batch["ids"]):
            for segment, protein in enumerate(ids[ids >= 0].tolist(), 1):
                at = batch["segment_ids"][row] == segment
                assert protein not in found
                found[protein] = batch["tokens"][row][at], batch["labels"][row][at]
    return found


def epoch_of(source, epoch=0):
    steps = source.steps_per_epoch
    return [source[step] for step in range(epoch * steps, (epoch + 1) * steps)]


def equal(one, two):
    assert one.keys() == two.keys()
    for protein in one:
        for a, b in zip(one[protein], two[protein], strict=True):
            np.testing.assert_array_equal(a, b)


@settings(max_examples=30)
@given(size=st.integers(1, 300), seed=st.integers(0, 2**32))
def test_what_was_chosen_can_be_undone(size, seed):
    tokens = example.synthetic_proteins(1, size, seed)[0]
    before = tokens.copy()
    record = example.mask_residues(tokens, np.random.default_rng(seed))
    np.testing.assert_array_equal(tokens, before)
    chosen = record["labels"] != example.IGNORED
    np.testing.assert_array_equal(np.where(chosen, record["labels"], record["tokens"]), tokens)
    assert all(array.dtype == np.int32 for array in record.values())


def test_specials_and_padding_are_never_masked():
    specials = (example.CLS, example.EOS, example.PAD, example.MASK)
    batches = list(source_of())
    assert any((batch["segment_ids"] == 0).any() for batch in batches)
    for batch in batches:
        tokens, labels, padding = batch["tokens"], batch["labels"], batch["segment_ids"] == 0
        assert (tokens[padding] == example.PAD).all()
        assert (labels[padding] == example.IGNORED).all()
        assert not np.isin(labels, specials).any()
    for epoch in range(2):
        found = masks(epoch_of(source_of(), epoch))
        assert sorted(found) == list(range(len(PROTEINS)))
        for protein, (tokens, labels) in found.items():
            assert (tokens[0], tokens[-1]) == (example.CLS, example.EOS)
            assert labels[0] == labels[-1] == example.IGNORED
            whole = np.where(labels == example.IGNORED, tokens, labels)
            np.testing.assert_array_equal(whole[1:-1], PROTEINS[protein])


def test_the_rates_are_those_of_bert():
    proteins = example.synthetic_proteins(1000, L - 2, seed=1)
    source = example.pack_proteins(proteins, L, batch_size=16)
    counts = [example.count(batch) for batch in source]
    total = {name: sum(one[name] for one in counts) for name in counts[0]}
    assert total["proteins"] == 1000
    assert total["residues"] == sum(map(len, proteins))
    chosen = total["chosen"]
    # Within five standard deviations; one of 20 residues drawn at random is about the same one.
    assert abs(chosen / total["residues"] - 0.15) < 0.004
    assert abs(total["masked"] / chosen - 0.8) < 0.012
    assert abs(total["same"] / chosen - 0.1 - 0.1 * 0.05) < 0.009
    assert total["on specials"] == total["on padding"] == 0


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_the_masks_do_not_depend_on_the_batch_size(batch_size):
    for epoch in range(2):
        other = source_of(batch_size=batch_size)
        equal(masks(epoch_of(other, epoch)), masks(epoch_of(source_of(), epoch)))


@pytest.mark.parametrize("count", [2, 3])
def test_the_masks_do_not_depend_on_the_number_of_hosts(count):
    hosts = [source_of(shard=(index, count)) for index in range(count)]
    batches = [batch for host in hosts for batch in epoch_of(host, 1)]
    equal(masks(batches), masks(epoch_of(source_of(), 1)))


def test_the_masks_do_not_depend_on_bins_or_their_order():
    equal(masks(source_of(shuffle=False, epochs=1)), masks(epoch_of(source_of())))


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_the_masks_do_not_depend_on_the_workers(workers):
    source = source_of(batch_size=16)
    batches = list(PackedDataset(source, num_workers=workers))
    assert len(batches) == len(source)
    half = source.steps_per_epoch
    equal(masks(batches[:half]), masks(epoch_of(source, 0)))
    equal(masks(batches[half:]), masks(epoch_of(source, 1)))


def test_epochs_and_seeds_mask_anew():
    first = masks(epoch_of(source_of()))
    for other in (masks(epoch_of(source_of(), 1)), masks(epoch_of(source_of(seed=4)))):
        same = [np.array_equal(first[protein][1], other[protein][1]) for protein in first]
        assert np.mean(same) < 0.1  # only very short ones can agree


def test_the_program_prints_its_table(capsys):
    example.main(["--proteins", "60", "--max-seq-len", "256", "--epochs", "2"])
    lines = capsys.readouterr().out.splitlines()
    heads = lines[0].replace("on ", "on_").split()
    rows = [dict(zip(heads, line.split(), strict=True)) for line in lines[1:3]]
    for row in rows:
        assert row["proteins"] == "60"
        assert 10 < float(row["chosen"].rstrip("%")) < 20
        assert (row["on_specials"], row["on_padding"]) == ("0", "0")
    assert rows[0]["chosen"] != rows[1]["chosen"]
    assert lines[-2].startswith("  tokens ")
    assert ">" in lines[-2]
    assert "#" not in lines[-1].split("labels ")[1]
