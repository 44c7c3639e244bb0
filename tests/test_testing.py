"""Packed = alone on right models passes, and on broken ones says what is broken."""

import broken_models as models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import seqpack_jax as sp
from seqpack_jax.demo_model import DemoModel, packed_loss
from seqpack_jax.model import segments
from seqpack_jax.model.attention import PackedSelfAttention
from seqpack_jax.testing import assert_packing_equivalence


def check(apply_fn, sequences=None, *, params=None, size=models.SIZE, **options):
    """Without exact lengths unless a test asks for them: each is a compilation."""
    params = models.weights() if params is None else params
    options = {"exact_lengths": 0} | options
    sequences = models.sequences() if sequences is None else sequences
    return assert_packing_equivalence(apply_fn, sequences, size, params=params, **options)


def kinds(apply_fn, *arguments, **options):
    """The kinds of leak that the error names."""
    with pytest.raises(AssertionError) as caught:
        check(apply_fn, *arguments, **options)
    lines = str(caught.value).splitlines()
    return [line.removeprefix("- ").split(":")[0] for line in lines if line.startswith("- ")]


# --- right models -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "apply_fn",
    [
        models.transformer(),
        models.transformer(causal=False),
        models.convolution(),
        models.state_space(),
        models.row_norm("token"),
    ],
    ids=["causal", "encoder", "convolution", "state space", "layer norm"],
)
def test_right_models_pass(apply_fn):
    report = check(apply_fn)
    assert max(report.outputs, report.gradients) < 2e-6
    assert report.loss is None
    assert (report.sequences, report.packings, report.rtol) == (7, 3, 1e-5)
    # FFD: 11 + 9 + 4, 7 + 6 + 5 + 3; with gaps another row; and one of padding.
    assert report.rows == 4


def test_the_compilations_are_counted_and_few():
    apply_fn = models.by_token
    assert check(apply_fn, exact_lengths=0).compilations == 1
    report = check(apply_fn, loss_fn=models.mean_loss(apply_fn), exact_lengths=2)
    assert report.compilations == (1 + 2) + (2 + 2)
    assert report.loss < 1e-6


def test_float_features_and_their_gradients():
    apply_fn = models.of_floats()
    loss_fn = models.mean_loss(apply_fn)
    report = check(apply_fn, models.records(), loss_fn=loss_fn)
    assert max(report.outputs, report.gradients, report.loss) < 2e-6


def test_features_without_tokens():
    records = [{"x": record["x"]} for record in models.records()]
    check(models.of_floats(), records)


def test_nan_in_the_padding_may_be_left_out():
    apply_fn = models.of_floats(cleaned=False)
    check(apply_fn, models.records(), planted="finite")
    check(apply_fn, models.records(), planted="nothing")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow)])
def test_sixteen_bits_have_their_own_tolerance(dtype):
    apply_fn = models.transformer(blocked=-(2.0**15))
    report = check(apply_fn, params=models.weights(dtype))
    assert report.rtol == (1e-2 if dtype == jnp.bfloat16 else 4e-3)
    assert report.outputs < report.rtol
    # Sums over all tokens, which XLA rounds to 16 bits more or less often.
    assert report.gradients < 5 * report.rtol


def test_a_model_that_computes_in_fewer_bits_than_it_shows():
    def mixed(w, batch):
        w = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), w)
        return models.by_token(w, batch).astype(jnp.float32)

    with pytest.raises(AssertionError, match=r"No change .*\n.*16 bits, so 0\.05 may do\.$"):
        check(mixed)
    check(mixed, rtol=5e-2)


def test_statistics_over_real_tokens_where_they_are_wanted():
    report = check(models.batch_norm(valid_only=True), batch_statistics=True)
    assert report.outputs < 1e-6
    # Over padding they remain wrong.
    assert kinds(models.batch_norm(), batch_statistics=True) == ["batch statistics"]


@pytest.mark.slow
def test_the_demo_model():
    model = DemoModel(nnx.Rngs(0), vocabulary=models.VOCABULARY, width=8, heads=2, layers=1)

    def apply_fn(model, batch):
        ids = batch["segment_ids"]
        bias = segments.build_packing_attention_bias(ids, jnp.float32, causal=True)
        return model(batch["tokens"], batch["positions"], bias)

    report = check(
        apply_fn, params=model, loss_fn=lambda model, batch: packed_loss(model, batch)[0]
    )
    assert max(report.outputs, report.gradients, report.loss) < 2e-6


class Statistics(nnx.Module):
    """It changes itself when it runs: the running averages of batch norm."""

    def __init__(self, masked, rngs):
        self.masked = masked
        self.embed = nnx.Embed(models.VOCABULARY, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, use_running_average=False, rngs=rngs)

    def __call__(self, batch):
        real = (batch["segment_ids"] > 0)[..., None]
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return self.norm(self.embed(batch["tokens"]), mask=real if self.masked else None)


@pytest.mark.slow
def test_batch_norm_of_nnx():
    right, wrong = (Statistics(masked, nnx.Rngs(0)) for masked in (True, False))
    check(lambda model, batch: model(batch), params=right, batch_statistics=True)
    options = {"params": wrong, "batch_statistics": True}
    assert kinds(lambda model, batch: model(batch), **options) == ["batch statistics"]


class LinenEncoder(linen.Module):
    @linen.compact
    def __call__(self, batch):
        x = linen.Embed(models.VOCABULARY, 8)(batch["tokens"])
        x += linen.Embed(models.SIZE, 8)(batch["positions"])
        mask = segments.segment_mask(batch["segment_ids"], causal=False)
        x += linen.MultiHeadDotProductAttention(num_heads=2)(x, mask=mask)
        return linen.LayerNorm()(x)


@pytest.mark.slow
def test_linen_attention():
    batch = {name: jnp.ones((1, 4), int) for name in ("tokens", "segment_ids", "positions")}
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        variables = LinenEncoder().init(jax.random.key(0), batch)
        check(LinenEncoder().apply, params=variables)


class Packed(nnx.Module):
    """The attention of the library, told the truth about segments or not."""

    def __init__(self, implementation, rngs):
        self.embed = nnx.Embed(models.VOCABULARY, 8, rngs=rngs)
        self.attention = PackedSelfAttention(
            2, 8, num_kv_heads=1, implementation=implementation, rngs=rngs
        )

    def __call__(self, batch, ids):
        x = self.embed(batch["tokens"])
        return self.attention(x, segments.segment_info(ids, batch["positions"]))


@pytest.mark.parametrize("implementation", ["dense", "blocked"])
def test_the_attention_of_the_library(implementation):
    params = Packed(implementation, nnx.Rngs(0))
    check(lambda model, batch: model(batch, batch["segment_ids"]), params=params)


def test_blocked_attention_that_leaks_is_not_taken_for_a_state():
    params = Packed("blocked", nnx.Rngs(0))
    found = kinds(lambda model, batch: model(batch, jnp.ones_like(batch["tokens"])), params=params)
    assert found == ["attention or recurrent state"]


def test_a_model_that_has_its_own_weights_and_several_outputs():
    w = models.weights()

    def apply_fn(_, batch):
        logits = models.by_token(w, batch)
        return {"logits": logits, "best": (jnp.argmax(logits, axis=-1),)}

    report = assert_packing_equivalence(apply_fn, models.sequences(), models.SIZE)
    assert (report.gradients, report.compilations) == (0.0, 3)


def test_under_debug_nans():
    with jax.debug_nans(True):
        check(models.of_floats(), models.records())
        assert kinds(models.of_floats(False), models.records()) == ["padding"]


# --- broken models ----------------------------------------------------------------------------

BROKEN = {
    "no mask, causal": (models.transformer(mask="none"), ["attention"]),
    "no mask": (models.transformer(mask="none", causal=False), ["attention", "padding"]),
    "padding mask": (models.transformer(mask="padding", causal=False), ["attention"]),
    "positions of the row": (models.transformer(positions="row"), ["embedding of positions"]),
    "convolution": (models.convolution(guarded=False), ["convolution"]),
    "batch norm": (models.batch_norm(), ["batch statistics"] * 2),
    "batch norm of real tokens": (models.batch_norm(valid_only=True), ["batch statistics"]),
    "row norm": (models.row_norm(), ["normalisation over the row"] * 2),
    "row norm of real tokens": (models.row_norm("real"), ["normalisation over the row"]),
    "state": (models.state_space(resets=False), ["recurrent state"]),
    "long state": (models.state_space(resets=False, decay=0.99), ["recurrent state"]),
    # Of one layer only the outputs on padding are NaN, and every gradient.
    "-inf": (models.transformer(mask="empty", blocked=-np.inf), ["NaN"]),
    "-inf in two layers": (models.transformer(mask="empty", blocked=-np.inf, layers=2), ["NaN"]),
    "a thousandth": (models.slight(1e-3), ["attention"]),
    "in the second row": (models.second_row, ["attention"]),
    "segment ids": (models.segment_numbers, ["segment number"]),
    "dropout": (models.dropout, ["randomness"]),
}


# Of a kind that another of them shows as well.
SLOW = {
    "padding mask",
    "batch norm of real tokens",
    "row norm of real tokens",
    "long state",
    "-inf in two layers",
}


@pytest.mark.parametrize(
    ("apply_fn", "expected"),
    [
        pytest.param(*case, id=name, marks=[pytest.mark.slow] if name in SLOW else [])
        for name, case in BROKEN.items()
    ],
)
def test_broken_models_are_caught(apply_fn, expected):
    assert kinds(apply_fn) == expected


def test_padding_that_only_divides_shows_at_exact_lengths():
    assert kinds(models.padded_mean, exact_lengths=1) == ["normalisation over the row"]


def test_a_leak_is_not_taken_for_the_rounding_of_sixteen_bits():
    params = models.weights(jnp.bfloat16)
    assert kinds(models.transformer(mask="none"), params=params) == ["attention"]


def test_nan_in_the_padding():
    assert kinds(models.of_floats(cleaned=False), models.records()) == ["padding"]


LOSSES = {
    "labels": ["labels"],
    "ids": ["segment ids as weights"],
    "rows": ["mean of means"],
    "padding": ["labels", "padding in the loss"],
    "denominator": ["denominator"],
}


@pytest.mark.parametrize(("fault", "expected"), LOSSES.items())
def test_broken_losses_are_caught(fault, expected):
    loss_fn = models.mean_loss(models.by_token, fault)
    assert kinds(models.by_token, loss_fn=loss_fn) == expected


def test_weights_of_tokens_are_no_labels():
    apply_fn = models.by_token
    check(apply_fn, models.records(), loss_fn=models.mean_loss(apply_fn))
    loss_fn = models.mean_loss(apply_fn, "denominator")
    assert kinds(apply_fn, models.records(), loss_fn=loss_fn) == ["denominator"]


def test_a_gradient_alone_may_be_wrong():
    @jax.custom_vjp
    def same_value(x, ids):
        del ids
        return x

    def backward(ids, g):
        return g + jnp.sum(g, axis=1, keepdims=True), np.zeros(ids.shape, jax.dtypes.float0)

    same_value.defvjp(lambda x, ids: (x, ids), backward)

    def apply_fn(w, batch):
        return same_value(models.embed(w, batch), batch["segment_ids"]) @ w["head"]

    with pytest.raises(AssertionError, match=r"the gradient of the outputs with respect to params"):
        check(apply_fn)


def test_the_message_says_where_and_how_much():
    sequences = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]  # twice: [2, 2], [0, 0, 1], [1]

    def apply_fn(_, batch):
        tokens = batch["tokens"].astype(jnp.float32)
        before = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)))
        return {"sum": tokens + jnp.where(batch["positions"] == 0, 0.5, 1.0) * before}

    with pytest.raises(AssertionError) as caught:
        assert_packing_equivalence(apply_fn, sequences, 8, gaps=False, exact_lengths=0)
    message = str(caught.value)
    assert message.startswith(
        "assert_packing_equivalence: output['sum'] differs in rows packed by first fit: first at "
        "row 0, segment 2, token 0 of it (sequence 2), 10.5 instead of 6; by up to 4.5, where "
        "rounding may make 0.00017.\nWhat leaks:\n- convolution: changing segment 1 of row 0 moves "
        "only tokens near it in the row, up to 1 away"
    )


@pytest.mark.parametrize("banned", [-1e9, -np.inf])
def test_numbers_far_beyond_the_others_hide_no_leak(banned):
    """Logits of banned tokens are -1e9, or -inf, in a right model too."""

    def with_banned(apply_fn):
        return lambda w, batch: apply_fn(w, batch).at[..., 0].set(banned)

    check(with_banned(models.transformer()))
    with pytest.raises(AssertionError, match="attention"):
        check(with_banned(models.slight()))


def test_the_first_layer_that_differs_is_named():
    def layers(w, batch):
        x = models.embed(w, batch)
        mixed = models.attend(w, x, batch)
        wrong = mixed - jnp.mean(mixed, axis=1, keepdims=True)
        last = models.attend(w, wrong, batch, mask="none")
        return {"z embedding": x, "y mixed": mixed, "x norm": wrong, "a last": last}

    with pytest.raises(AssertionError) as caught:
        check(lambda w, batch: layers(w, batch)["a last"], layers_fn=layers)
    assert "\nThe first layer that differs is 'x norm'.\n" in str(caught.value)
    assert "- normalisation over the row" in str(caught.value)


# --- arguments --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sequences", "size", "options", "part"),
    [
        ([], 8, {}, "there are no sequences"),
        ([[1, 2], [3, 4]], 3, {}, "no two sequences fit into 3 tokens"),
        ([[1, 1], [1]], 4, {}, "all tokens of the sequences are the same"),
        ([[1, 2], [3]], 1, {}, r"max_seq_len = 1, but it must be at least 2"),
        ([[1, 2], [3]], 4, {"planted": "inf"}, r"planted = 'inf' is not known"),
        ([[1, 2], [3]], 4, {"exact_lengths": -1}, r"exact_lengths = -1"),
        ([{"weight": 1.0}], 4, {}, "sequence 0 has no tokens and no features"),
        ([{}], 4, {}, "sequence 0 has no tokens and no features"),
    ],
)
def test_bad_arguments_are_refused(sequences, size, options, part):
    with pytest.raises(sp.SeqpackError, match=f"^assert_packing_equivalence: .*{part}"):
        assert_packing_equivalence(lambda _, batch: batch["tokens"], sequences, size, **options)


def test_what_functions_return_is_checked():
    sequences = [[1, 2, 3], [4, 5]]
    part = r"output\[1\] of apply_fn has shape \(3,\), but the batch is \(3, 5\)"
    with pytest.raises(sp.SeqpackError, match=part):
        assert_packing_equivalence(
            lambda _, batch: (batch["tokens"], batch["tokens"][:, 0]), sequences, 5
        )
    with pytest.raises(sp.SeqpackError, match=r"loss_fn returns \(2, 5\), not a scalar"):
        assert_packing_equivalence(
            lambda _, batch: batch["tokens"],
            sequences,
            5,
            loss_fn=lambda _, batch: batch["tokens"],
            exact_lengths=0,
        )


def test_a_model_of_one_length_says_how_to_go_on():
    def apply_fn(w, batch):
        if batch["tokens"].shape[1] != models.SIZE:
            raise TypeError("24 tokens")
        return models.embed(w, batch)

    with pytest.raises(TypeError, match="24 tokens") as caught:
        check(apply_fn, exact_lengths=1)
    assert "exact_lengths=0 omits it" in str(caught.value.__notes__)
    check(apply_fn, exact_lengths=0)


def test_one_sequence_is_packed_with_itself():
    report = check(models.state_space(), [[1, 2, 3]], size=7)
    assert report.sequences == 1
    assert kinds(models.state_space(resets=False), [[1, 2, 3]], size=7) == ["recurrent state"]


def test_gaps_may_be_left_out():
    def needs_whole_rows(w, batch):
        ids = batch["segment_ids"]
        hole = (ids[:, :-1] == 0) & (ids[:, 1:] > 0)
        bad = jnp.any(hole, axis=1)[:, None, None]
        return jnp.where(bad, 0, models.embed(w, batch))

    with pytest.raises(
        AssertionError, match=r"padding between segments \(multiples of 2; see gaps"
    ):
        check(needs_whole_rows)
    assert check(needs_whole_rows, gaps=False).packings == 2
