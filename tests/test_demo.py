"""The demo on real text, and that its checks can fail."""

import io
import itertools
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqpack_jax import demo, demo_model
from seqpack_jax.demo import BOS, EOS, LIMIT, PAD, DemoError, DemoOptions, decode, encode
from seqpack_jax.demo_model import (
    VOCABULARY,
    Comparison,
    DemoModel,
    Trainer,
    TrainingStep,
    compare_with_alone,
    training_steps,
)
from seqpack_jax.errors import SeqpackError
from seqpack_jax.feeding.pipeline import pack_dataset
from seqpack_jax.feeding.sequences import FlatSequences
from seqpack_jax.model.segments import build_packing_attention_bias

LENGTHS = (17, 5, 40, 9, 23, 2, 30, 12, 48, 31, 7, 16)
MAX_SEQ_LEN = 48


@pytest.fixture(scope="module")
def texts():
    return demo.collect_docstrings()


@pytest.fixture(scope="module")
def tiny():
    """Return a small model, and one packed batch of twelve random sequences."""
    rng = np.random.default_rng(0)
    sequences = [rng.integers(3, VOCABULARY, n) for n in LENGTHS]
    source = pack_dataset(sequences, MAX_SEQ_LEN, batch_size=6, seed=1)
    model = DemoModel(nnx.Rngs(0), width=16, heads=2, layers=2)
    return model, source[0], sequences


# --- text -------------------------------------------------------------------------------------


def test_the_corpus_is_large_and_distinct(texts):
    assert len(texts) >= 5000
    assert len(set(texts)) == len(texts)
    assert sum(map(len, texts)) > 1_000_000


def test_encoding_is_reversible(texts):
    sequences = demo.encode_all(texts)
    assert len(sequences) == len(texts)
    assert int(sequences.tokens.max()) < VOCABULARY
    assert [decode(sequences[k]) for k in range(len(texts))] == texts


def test_encoding_by_hand():
    assert encode("aé").tolist() == [BOS, 97 + 3, 0xC3 + 3, 0xA9 + 3, EOS]
    assert decode(np.array([PAD, BOS, 100, EOS, PAD], np.int32)) == "a"
    assert decode(encode("é")[:2]) == "\N{REPLACEMENT CHARACTER}"  # a document split in a character


def test_cutting_by_hand():
    sequences = FlatSequences(np.arange(9), np.array([0, 2, 9]))
    assert [piece.tolist() for piece in demo._cut(sequences, 3)] == [
        [0, 1],
        [2, 3, 4],
        [5, 6, 7],
        [8],
    ]


# --- feeding ----------------------------------------------------------------------------------


def test_feeding_is_checked_and_the_check_can_fail(monkeypatch, capsys):
    console = demo.Console(highlight=False)
    sequences = demo.encode_all(["a" * n for n in range(1, 90)])
    options = DemoOptions(batch_size=4, max_seq_len=64)
    demo._feed(console, sequences, options)
    assert "seen exactly twice" in capsys.readouterr().out
    monkeypatch.setattr(demo, "_segments", lambda part: itertools.islice(_all(part), 1, None))
    with pytest.raises(DemoError, match="each sequence exactly once"):
        demo._feed(console, sequences, options)


_all = demo._segments


# --- the model --------------------------------------------------------------------------------


def test_packed_equals_alone(tiny):
    model, batch, sequences = tiny
    result = compare_with_alone(model, batch)
    assert (result.rows, result.sequences) == (6, len(sequences))
    assert result.worst < LIMIT
    assert result.logits[0] > 0.1
    assert result.gradients[0] > 0.01  # far above the limit: the differences mean something


def test_packed_equals_alone_without_any_padding(tiny):
    """The demo runs sequences alone in rows of full length; here each is `[1, n]`."""
    model, batch, _ = tiny
    run = nnx.jit(DemoModel.__call__)
    bias = build_packing_attention_bias(batch["segment_ids"], causal=True)
    packed = run(model, batch["tokens"], batch["positions"], bias)
    for row, segment in ((0, 1), (1, 2)):
        where = batch["segment_ids"][row] == segment
        n = int(where.sum())
        tokens, positions = batch["tokens"][row][where][None], np.arange(n)[None]
        bias = np.where(np.tri(n, dtype=bool), np.float32(0), np.float32(-1e30))[None, None]
        alone = run(model, tokens, positions, bias)
        np.testing.assert_allclose(packed[row][where], alone[0], atol=1e-5)


def _everything_attends(segment_ids, dtype, *, causal):
    return build_packing_attention_bias(jnp.ones_like(segment_ids), dtype, causal=causal)


def _plain_shift(tokens, segment_ids):
    return jnp.roll(tokens, -1, axis=1), segment_ids > 0


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("build_packing_attention_bias", _everything_attends),
        ("next_token_labels", _plain_shift),
    ],
)
def test_the_proof_fails_without_the_mask_or_the_labels(tiny, monkeypatch, name, broken):
    model, batch, _ = tiny
    monkeypatch.setattr(demo_model, name, broken)
    assert compare_with_alone(model, batch).worst > 10 * LIMIT


def test_the_proof_fails_with_wrong_positions(tiny):
    model, batch, _ = tiny
    # That they merely run on over the row would not show: rotary scores depend on distances alone.
    wrong = batch | {"positions": batch["positions"] * 2}
    assert compare_with_alone(model, wrong).worst > 10 * LIMIT


def test_the_proof_does_not_pass_on_nan():
    good, bad = np.array([1.0, 2.0]), np.array([1.0, np.nan])
    assert demo_model._largest([good, good], [good, good + 1]) == (3, 1)
    for packed in ([good, bad], [bad, good]):
        assert np.isnan(demo_model._largest(packed, [good, good])[1])
    result = Comparison(1, 1, (1, 0), (1, np.nan), (1, 0))
    assert not result.worst < LIMIT


# --- training ---------------------------------------------------------------------------------


def test_the_loss_falls_in_one_compilation():
    sequences = demo.encode_all([f"{k}: the same words again and again" for k in range(100)])
    source = pack_dataset(sequences, 64, batch_size=4, epochs=1000)
    batches = map(source.__getitem__, range(len(source)))
    trainer = Trainer(layers=1, learning_rate=1e-2)
    losses, layouts = [], set()
    for batch in itertools.islice(batches, 15):
        loss, tokens = trainer.step(batch)
        assert tokens == int((batch["segment_ids"] > 0).sum())
        losses.append(loss)
        layouts.add(batch["segment_ids"].tobytes())
    assert losses[-1] < losses[0] - 1
    assert len(layouts) > 1
    assert trainer.compilations == 1
    trainer.step({name: array[:2] for name, array in source[0].items()})
    assert trainer.compilations == 2  # the counter does count


def test_training_stops_in_time(monkeypatch):
    clock = itertools.count()  # each look at it takes a second, so does each step
    monkeypatch.setattr(demo_model.time, "perf_counter", lambda: next(clock))
    trainer = SimpleNamespace(step=lambda batch: (float(batch), 10))
    steps = list(training_steps(trainer, itertools.count(), seconds=6, window=3))
    assert [at.step for at in steps] == [1, 2, 3, 4, 5, 6]
    assert [at.loss for at in steps] == [0, 0.5, 1, 2, 3, 4]
    assert [at.tokens_per_second for at in steps] == [0] + 5 * [10]
    assert len(list(training_steps(trainer, itertools.count(), seconds=0.5))) == 2


def test_progress_without_a_terminal_is_a_line_now_and_then(capsys):
    with demo._progress(demo.Console(highlight=False), 60) as show:
        for step in range(1, 60):
            show(TrainingStep(step, float(step), 2.5, 12345.6))
    assert capsys.readouterr().out.splitlines() == [
        "step 25: loss 2.500, 12,346 tokens/s",
        "step 50: loss 2.500, 12,346 tokens/s",
    ]


def test_progress_on_a_terminal_is_a_bar():
    console = demo.Console(force_terminal=True, width=80, record=True, file=io.StringIO())
    with demo._progress(console, 60) as show:
        show(TrainingStep(1, 1.0, 2.5, 12345.6))
    assert "step 1: loss 2.500, 12,346 tokens/s" in console.export_text()


# --- stop and resume --------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path):
    """Stop a loader after seven batches; return its folder and the digest of what comes next."""
    options = DemoOptions(batch_size=2, max_seq_len=64, seed=3)
    sequences = demo.encode_all([str(k) * (1 + k % 90) for k in range(300)])
    source = demo._make_source(sequences, options, epochs=demo.TRAINING_EPOCHS)
    iterator = iter(demo._make_loader(source))
    seen = [demo.batch_digest(next(iterator)) for _ in range(7)]
    demo.save_checkpoint(tmp_path, sequences, options, iterator)
    following = demo.batch_digest(next(iterator))
    assert following not in seen
    return tmp_path, following


def test_a_fresh_process_goes_on_with_the_same_batch(checkpoint):
    folder, following = checkpoint
    assert demo.digest_in_fresh_process(folder) == following


def test_resuming_another_epoch_order_is_refused(checkpoint, capsys):
    folder, following = checkpoint
    assert demo.resume_in(folder) == 0
    assert capsys.readouterr().out.strip() == following
    options = json.loads((folder / "options.json").read_text())
    (folder / "options.json").write_text(json.dumps(options | {"seed": 4}))
    with pytest.raises(ValueError, match="PackedSource"):
        demo.resume_in(folder)
    with pytest.raises(DemoError, match="the fresh process ended with 1"):
        demo.digest_in_fresh_process(folder)


def test_resuming_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(SeqpackError, match="holds no checkpoint"):
        demo.resume_in(tmp_path)


# --- the whole --------------------------------------------------------------------------------


def test_a_failed_check_is_exit_code_1(monkeypatch, capsys):
    def fails(console):
        demo._check(False, "one [/and] one is three")

    monkeypatch.setattr(demo, "_collect", fails)
    assert demo.run_demo() == 1
    assert "FAILED: this does not hold: one [/and] one is three" in capsys.readouterr().out


@pytest.mark.slow
def test_the_whole_demo():
    command = [sys.executable, "-m", "seqpack_jax.cli", "demo", "--seconds", "5"]
    environment = os.environ | {"COLUMNS": "120"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    for part in (
        "one sequence per row, padded",
        "lower bound for any packing",
        "seen exactly twice, once per epoch: checked",
        "compilations of the step: 1\n",
        "identical\n",
        "All checks passed in ",
    ):
        assert part in result.stdout
