"""Our arrays go through what stands in front of the kernel; the kernel itself is emulated.

No kernel here runs without a GPU.  JAX's own preparation is the installed one; TransformerEngine's
is written down again below, from its source, and so is what marin asks of its bounds.
"""

import functools
import math
import sys
import types
from typing import NamedTuple

import attention_reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_reference import HARD_ROWS
from jax._src.cudnn import fused_attention_stablehlo as cudnn

import seqpack_jax as sp
from seqpack_jax.model.kernel_adapters import to_jax_cudnn, to_marin, to_te, to_tokamax_mask
from seqpack_jax.model.segments import segment_info

TOKAMAX = "tokamax._src.ops.attention.base"
TE = "transformer_engine.jax.attention"
SETTINGS = [(True, None), (True, 3), (False, None)]  # causal, window

# Decoder and encoder rows: equal ones, ids on one side only, padding everywhere, no common id.
QUERY_ROWS = np.array(
    [
        [1, 1, 1, 2, 2, 3, 0, 0],
        [1, 0, 2, 2, 3, 3, 4, 4],
        [0, 1, 1, 2, 2, 2, 3, 0],
        [0] * 8,
        [1, 1, 1, 1, 1, 1, 1, 1],
        [1, 2, 3, 4, 5, 6, 7, 8],
    ],
    np.int32,
)
KEY_ROWS = np.array(
    [
        [1, 2, 2, 2, 3, 3, 3, 0, 0, 0],
        [0, 1, 1, 0, 3, 3, 3, 4, 0, 0],
        [2, 2, 3, 3, 3, 3, 3, 3, 3, 3],
        [1, 1, 1, 1, 1, 2, 2, 2, 3, 4],
        [0] * 10,
        [1, 2, 3, 4, 5, 6, 7, 8, 9, 10],
    ],
    np.int32,
)


class Slot(NamedTuple):
    """One segment as the kernel sees it: where it starts in the flat array, and its tokens."""

    query_start: int
    queries: int
    key_start: int
    keys: int


def packed_kernel(arrays, slots, causal, window, cotangent):
    """Attend in each slot on flat arrays: output and gradients; what no slot covers stays 0."""
    (_, _, heads, size), kv_heads = arrays[0].shape, arrays[1].shape[2]
    flat = [np.asarray(each, np.float64).ravel() for each in (*arrays, cotangent)]
    output, *gradients = (np.zeros_like(flat[index]) for index in (0, 0, 1, 2))
    for slot in slots:
        queries = (slot.query_start, slot.queries, heads, size)
        keys = (slot.key_start, slot.keys, kv_heads, size)
        places = (queries, keys, keys, queries)
        cuts = [cut(each, *place) for each, place in zip(flat, places, strict=True)]
        if any(each is None for each in cuts):
            continue  # outside of the arrays, so the tokens that were meant stay 0
        q, k, v, back = cuts
        allowed = attention_reference._allowed(slot.queries, slot.keys, causal, window)
        attended, *backward = attend(q, k, v, allowed, back)
        cut(output, *queries)[:] = attended
        for gradient, place, found in zip(gradients, places, backward, strict=False):
            cut(gradient, *place)[:] += found
    shaped = zip([output, *gradients], [arrays[0], *arrays], strict=True)
    output, *gradients = (each.reshape(like.shape) for each, like in shaped)
    return output, gradients


def cut(flat, start, tokens, heads, size):
    """View `[tokens, heads, size]` of a flat array, or return None outside of it."""
    stop = start + tokens * heads * size
    inside = start >= 0 and stop <= flat.size
    return flat[start:stop].reshape(tokens, heads, size) if inside else None


def attend(query, key, value, allowed, cotangent):
    """Attend where `allowed` `[queries, keys]`: output, and gradients of query, key and value."""
    group = query.shape[1] // key.shape[1]
    output, d_query, d_key, d_value = (np.zeros_like(each) for each in (query, query, key, value))
    scale = 1 / math.sqrt(query.shape[-1])
    for head in range(query.shape[1]):
        q, k, v = query[:, head], key[:, head // group], value[:, head // group]
        weights = np.where(allowed, np.exp(q @ k.T * scale), 0)
        weights /= np.maximum(weights.sum(axis=1, keepdims=True), 1e-300)  # no key: 0
        output[:, head] = weights @ v
        of_weights = cotangent[:, head] @ v.T
        of_scores = weights * (of_weights - (weights * of_weights).sum(axis=1, keepdims=True))
        d_query[:, head] = of_scores @ k * scale
        d_key[:, head // group] += of_scores.T @ q * scale
        d_value[:, head // group] += weights.T @ cotangent[:, head]
    return output, d_query, d_key, d_value


def worst_by_row(run, arrays, expected, rows):
    """Return, row by row, by how much the output of the real tokens differs."""
    output, _ = run(arrays, np.zeros_like(arrays[0]))
    return np.where((rows > 0)[..., None, None], abs(output - expected), 0).max(axis=(1, 2, 3))


def assert_exact(run, rows, *, causal, window, kv_heads=4, kv_rows=None):
    """Compare `run(arrays, cotangent)` and its gradients with each segment alone."""
    kv_length = None if kv_rows is None else kv_rows.shape[1]
    arrays = attention_reference.random_qkv(rows, 4, kv_heads, kv_length=kv_length)
    mode = {"causal": causal, "window": window, "kv_rows": kv_rows}
    real = (rows > 0)[..., None, None]
    cotangent = np.where(real, np.random.default_rng(1).normal(size=arrays[0].shape), 0)
    output, gradients = run(arrays, cotangent)
    expected = attention_reference.attend_alone(*arrays, rows, **mode)
    np.testing.assert_allclose(np.where(real, output, 0), expected, atol=1e-12)
    expected = attention_reference.gradients_alone(*arrays, cotangent, rows, **mode)
    for ours, theirs in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-12)


def stand_in(monkeypatch, name):
    """Put an empty module under this name, and one under the name of each package around it."""
    outer, parts = None, name.split(".")
    for count in range(1, len(parts) + 1):
        module = types.ModuleType(".".join(parts[:count]))
        monkeypatch.setitem(sys.modules, module.__name__, module)
        if outer is not None:
            setattr(outer, parts[count - 1], module)
        outer = module
    return outer


# JAX's packed cuDNN attention.


def cudnn_slots(packed, query_shape, key_shape):
    """Run the installed `_fix_seqlen_offsets`, and read its arrays as cuDNN does."""
    names = ("q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets")
    given = (packed[name] for name in names)
    return slots_of(*prepare(cudnn._fix_seqlen_offsets, query_shape, key_shape, *given))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def prepare(fix, query_shape, key_shape, *given):
    query, key = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in (query_shape, key_shape))
    return fix(*given, query, key)


def slots_of(queries, keys, query_starts, key_starts):
    """Pair lengths with starts by their place in the arrays, as cuDNN does."""
    queries, keys, query_starts, key_starts = (
        np.asarray(each).ravel().tolist() for each in (queries, keys, query_starts, key_starts)
    )
    places = range(len(queries))
    slots = (Slot(query_starts[i], queries[i], key_starts[i], keys[i]) for i in places)
    return [slot for slot in slots if slot.queries > 0 and slot.keys > 0]


def through_cudnn(packed):
    """Return an attention of query, key and value by what `to_jax_cudnn` made."""
    causal = packed["mask_type"] == cudnn.MaskType.PADDING_CAUSAL

    def run(arrays, cotangent):
        slots = cudnn_slots(packed, arrays[0].shape, arrays[1].shape)
        return packed_kernel(arrays, slots, causal, packed["sliding_window_length"], cotangent)

    return run


@pytest.mark.parametrize(("causal", "window"), SETTINGS)
def test_cudnn_sees_each_segment_alone(causal, window):
    """One row has as many segments as there may be, one none, some padding in between."""
    info = segment_info(HARD_ROWS, causal=causal, window=window, max_segments=16)
    packed = to_jax_cudnn(info, 4, 4)
    assert packed["qkv_layout"] == "BTNH"
    assert_exact(through_cudnn(packed), HARD_ROWS, causal=causal, window=window)


def test_cudnn_sees_the_keys_of_another_row_of_segments():
    info = segment_info(QUERY_ROWS, kv_segment_ids=KEY_ROWS, causal=False, max_segments=16)
    run = through_cudnn(to_jax_cudnn(info, 4, 4))
    assert_exact(run, QUERY_ROWS, causal=False, window=None, kv_rows=KEY_ROWS)


def with_ends(seqlens, starts):
    """Put the end of the last segment behind its start, as flash-attention's offsets have it."""
    ends = np.array(starts)
    for row, (lengths, of_row) in enumerate(zip(np.asarray(seqlens), ends, strict=True)):
        count = np.count_nonzero(lengths > 0)
        if count:
            ends[row, count] = of_row[count - 1] + lengths[count - 1]
    return ends


def test_cudnn_emulation_fails_on_other_encodings():
    """Each of these is right in the first row, so in a batch of one row, and wrong in others."""
    arrays = attention_reference.random_qkv(HARD_ROWS, 4, 4)
    expected = attention_reference.attend_alone(*arrays, HARD_ROWS, causal=True)
    packed = to_jax_cudnn(segment_info(HARD_ROWS, max_segments=16), 4, 4)

    def errors(seqlens, offsets):
        both = {"q_seqlen": seqlens, "kv_seqlen": seqlens}
        both |= {"q_offsets": offsets, "kv_offsets": offsets}
        return worst_by_row(through_cudnn(packed | both), arrays, expected, HARD_ROWS)

    seqlens, starts = packed["q_seqlen"], packed["q_offsets"]
    assert (errors(seqlens, starts) < 1e-12).all()
    ends = with_ends(seqlens, starts)
    last = ends.max(axis=1, keepdims=True)
    lengths = np.maximum(seqlens, 0)  # cuDNN's preparation takes a length of 0 for a segment
    for found in (
        errors(seqlens, jnp.asarray(ends)),
        errors(seqlens, jnp.asarray(np.where(ends < 0, last, ends))),
        errors(jnp.asarray(lengths), starts),
    ):
        assert found[0] < 1e-12
        assert (found[[1, 2, 3]] > 0.1).all()


def test_unpaired_segments_of_queries_and_keys_are_wrong():
    """What each side would be on its own."""
    packed, keys = (
        to_jax_cudnn(segment_info(rows, causal=False, max_segments=16), 4, 4)
        for rows in (QUERY_ROWS, KEY_ROWS)
    )
    packed |= {name: keys[name] for name in ("kv_seqlen", "kv_offsets")}
    arrays = attention_reference.random_qkv(QUERY_ROWS, 4, 4, kv_length=10)
    mode = {"causal": False, "kv_rows": KEY_ROWS}
    expected = attention_reference.attend_alone(*arrays, QUERY_ROWS, **mode)
    found = worst_by_row(through_cudnn(packed), arrays, expected, QUERY_ROWS)
    assert found[0] < 1e-12
    assert (found[[1, 2, 5]] > 0.1).all()


def test_rows_with_too_many_segments_do_not_spoil_others():
    rows = HARD_ROWS[[5, 0, 1, 2, 3, 4]]  # the first has 16 segments, the next 3, 5, 3, 1 and 0
    arrays = attention_reference.random_qkv(rows, 4, 4)
    expected = attention_reference.attend_alone(*arrays, rows, causal=True)
    run = through_cudnn(to_jax_cudnn(segment_info(rows, max_segments=3), 4, 4))
    kept = np.where(rows > 3, 0, rows)
    assert (worst_by_row(run, arrays, expected, kept) < 1e-12).all()


def test_grouped_queries_are_served_exactly_where_jax_is_right():
    """Whether the installed JAX is (jax-ml/jax#39521) is found by running it."""
    info = segment_info(HARD_ROWS, max_segments=16)
    arrays = attention_reference.random_qkv(HARD_ROWS, 4, 2)
    expected = attention_reference.attend_alone(*arrays, HARD_ROWS, causal=True)
    run = through_cudnn(to_jax_cudnn(info, 4, 4))
    if worst_by_row(run, arrays, expected, HARD_ROWS).max() > 1e-12:
        with pytest.raises(sp.SeqpackError, match="reads wrong keys when num_kv_heads < num_heads"):
            to_jax_cudnn(info, 4, 2)
    else:
        run = through_cudnn(to_jax_cudnn(info, 4, 2))
        assert_exact(run, HARD_ROWS, causal=True, window=None, kv_heads=2)


def grouped_fix(right):
    """Return a `_fix_seqlen_offsets` that minds the heads of the keys, or one that does not."""
    own = cudnn._fix_seqlen_offsets

    def fix(q_seqlen, kv_seqlen, q_offsets, kv_offsets, query, key):
        given = (q_seqlen, kv_seqlen, q_offsets, kv_offsets)
        fixed = own(*given, query, jax.ShapeDtypeStruct(query.shape, query.dtype))
        group = query.shape[2] // key.shape[2]
        return (*fixed[:3], fixed[3] // group if right else fixed[3])

    return fix


def test_both_kinds_of_jax_are_told_apart(monkeypatch):
    info = segment_info(HARD_ROWS, max_segments=16)

    def inside_jit():
        def offsets(ids):
            return to_jax_cudnn(segment_info(ids, max_segments=16), 4, 2)["kv_offsets"]

        return jax.jit(offsets)(HARD_ROWS)

    monkeypatch.setattr(cudnn, "_fix_seqlen_offsets", grouped_fix(right=True))
    np.testing.assert_array_equal(inside_jit()[:, 0], [0, 0, 0, 0, -1, 0])
    run = through_cudnn(to_jax_cudnn(info, 4, 2))
    assert_exact(run, HARD_ROWS, causal=True, window=None, kv_heads=2)
    monkeypatch.setattr(cudnn, "_fix_seqlen_offsets", grouped_fix(right=False))
    to_jax_cudnn(info, 4, 4)
    for broken in (cudnn._fix_seqlen_offsets, lambda query: query, None):
        monkeypatch.setattr(cudnn, "_fix_seqlen_offsets", broken)
        with pytest.raises(sp.SeqpackError, match="update JAX"):
            inside_jit()


def test_cudnn_takes_the_call(monkeypatch):
    """The installed function is lowered for a GPU, forward and backward, as far as a CPU can."""
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 92000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)
    info = segment_info(HARD_ROWS, window=3, max_segments=16)
    heads = jax.ShapeDtypeStruct((6, 16, 4, 8), jnp.bfloat16)

    def loss(query, key, value, info):
        packed = to_jax_cudnn(info, 4, 4)
        output = cudnn.dot_product_attention(query, key, value, scale=8**-0.5, **packed)
        return output.astype(jnp.float32).sum()

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    lowered = gradient.trace(heads, heads, heads, info).lower(lowering_platforms=("cuda",))
    text = lowered.as_text().replace(r"\22", "'")
    for call in ("@__cudnn$fmhaSoftmax(", "@__cudnn$fmhaSoftmaxBackward("):
        assert text.count(call) == 1
    for setting in ("'mask_type': 'PADDING_CAUSAL'", "'sliding_window_length': 3"):
        assert text.count(setting) == 2
    assert text.count("'max_seg_per_batch': 16") == 2


# TransformerEngine.


class SequenceDescriptor(NamedTuple):
    """Stands in for TransformerEngine's class: its two constructors for packed rows."""

    seqlens: tuple = ()
    seq_offsets: tuple = ()
    segment_ids: tuple = ()
    segment_pos: tuple = ()

    @classmethod
    def from_seqlens_and_offsets(cls, seqlens, seq_offsets):
        return cls(seqlens=seqlens, seq_offsets=seq_offsets)

    @classmethod
    def from_segment_ids_and_pos(cls, segment_ids, segment_pos):
        return cls(segment_ids=segment_ids, segment_pos=segment_pos)


@pytest.fixture
def te(monkeypatch):
    """A module in the place of `transformer_engine.jax.attention`, which needs CUDA to install."""
    module = stand_in(monkeypatch, TE)
    module.SequenceDescriptor = SequenceDescriptor
    return module


def te_slots(seqlens, offsets, query_shape, key_shape):
    """Prepare as TransformerEngine's `FusedAttnFwdPrimitive.impl` does for packed layouts.

    Lengths over 0 move to the front, over all rows; so do starts from 0 on, counted from the first
    row, and the rest points behind the last token.
    """
    lengths, starts = [], []
    for part, shape in zip((0, 1), (query_shape, key_shape), strict=True):
        rows, tokens = shape[:2]
        length, start = (np.asarray(each[part]) for each in (seqlens, offsets))
        flat = [row * tokens + at for row in range(rows) for at in start[row].tolist() if at >= 0]
        front = [n for n in length.ravel().tolist() if n > 0]
        lengths.append(front + [0] * (length.size - len(front)))
        flat += [rows * tokens] * (start.size - len(flat))
        starts.append(np.array(flat) * shape[2] * shape[3])
    return slots_of(*lengths, *starts)


def through_te(arguments):
    """Return an attention of query, key and value by what `to_te` made of contiguous rows."""
    causal = {"padding_causal": True, "padding": False}[arguments.attn_mask_type]
    descriptor = arguments.sequence_descriptor
    left, right = arguments.window_size or (-1, -1)
    if left >= 0:
        assert right == (0 if causal else left)

    def run(arrays, cotangent):
        shapes = (arrays[0].shape, arrays[1].shape)
        slots = te_slots(descriptor.seqlens, descriptor.seq_offsets, *shapes)
        return packed_kernel(arrays, slots, causal, left + 1 if left >= 0 else None, cotangent)

    return run


@pytest.mark.parametrize(("causal", "window"), [*SETTINGS, (False, 3)])
def test_te_sees_each_segment_alone(te, causal, window):
    info = segment_info(HARD_ROWS, causal=causal, window=window, max_segments=16)
    arguments = to_te(info)
    assert arguments.max_segments_per_seq == 16
    assert_exact(through_te(arguments), HARD_ROWS, causal=causal, window=window, kv_heads=2)


def test_te_sees_the_keys_of_another_row_of_segments(te):
    info = segment_info(QUERY_ROWS, kv_segment_ids=KEY_ROWS, causal=False, max_segments=16)
    mode = {"causal": False, "window": None, "kv_rows": KEY_ROWS}
    assert_exact(through_te(to_te(info)), QUERY_ROWS, kv_heads=2, **mode)


def test_te_emulation_fails_on_other_encodings(te):
    arrays = attention_reference.random_qkv(HARD_ROWS)
    expected = attention_reference.attend_alone(*arrays, HARD_ROWS, causal=True)
    arguments = to_te(segment_info(HARD_ROWS, max_segments=16))
    (seqlens, _), (starts, _) = arguments.sequence_descriptor[:2]

    def errors(seqlens, offsets):
        descriptor = SequenceDescriptor((seqlens, seqlens), (offsets, offsets))
        run = through_te(arguments._replace(sequence_descriptor=descriptor))
        return worst_by_row(run, arrays, expected, HARD_ROWS)

    assert (errors(seqlens, starts) < 1e-12).all()
    assert (errors(np.maximum(seqlens, 0), starts) < 1e-12).all()  # to it 0 is no segment either
    found = errors(seqlens, with_ends(seqlens, starts))  # the example of its own docstring
    assert found[0] < 1e-12
    assert (found[[1, 2, 3]] > 0.1).all()


def test_te_rows_with_too_many_segments_do_not_spoil_others(te):
    """They do with the lengths and starts that it makes itself of ids: one start too many."""
    rows = HARD_ROWS[[5, 0, 2]]  # 16 segments, 3 and 3
    arrays = attention_reference.random_qkv(rows)
    expected = attention_reference.attend_alone(*arrays, rows, causal=True)
    kept = np.where(rows > 3, 0, rows)
    arguments = to_te(segment_info(rows, max_segments=3))
    assert (worst_by_row(through_te(arguments), arrays, expected, kept) < 1e-12).all()
    lengths = np.array([[np.count_nonzero(row == i) for i in (1, 2, 3)] for row in rows])
    starts = np.array([[0, 1, 2, 3], [0, 5, 13, -1], [0, 4, 8, -1]])
    descriptor = SequenceDescriptor((lengths, lengths), (starts, starts))
    run = through_te(arguments._replace(sequence_descriptor=descriptor))
    assert (worst_by_row(run, arrays, expected, kept)[1:] > 0.1).all()


@pytest.mark.parametrize("asks", [False, True])
def test_te_gets_ids_and_positions_of_reordered_rows(te, asks):
    """They are all that a mask needs: same id, and a position that is not later."""
    if asks:  # releases 2.12 and 2.13

        class Asking(SequenceDescriptor):
            @classmethod
            def from_segment_ids_and_pos(
                cls, segment_ids, segment_pos, *, is_thd, is_segment_ids_reordered
            ):
                assert is_thd
                assert is_segment_ids_reordered
                return cls(segment_ids=segment_ids, segment_pos=segment_pos)

        te.SequenceDescriptor = Asking
    order = np.random.default_rng(0).permutation(16)
    info = segment_info(HARD_ROWS)
    positions = info.positions[:, order]
    moved = segment_info(HARD_ROWS[:, order], positions, max_segments=16, contiguous=False)
    ids, starts = to_te(moved).sequence_descriptor[2:]
    assert to_te(moved).attn_mask_type == "padding_causal"
    for given, theirs in ((HARD_ROWS, ids), (np.asarray(info.positions), starts)):
        assert len(theirs) == 2
        for each in theirs:
            np.testing.assert_array_equal(each, given[:, order])
    both = segment_info(
        HARD_ROWS[:, order],
        positions,
        kv_segment_ids=KEY_ROWS,
        causal=False,
        max_segments=16,
        kv_positions=np.zeros_like(KEY_ROWS),
        contiguous=False,
    )
    ids, starts = to_te(both).sequence_descriptor[2:]
    assert (ids[1].shape, starts[1].shape) == ((6, 10), (6, 10))


# marin, and tokamax with a stand-in (test_tokamax.py runs tokamax itself).


def through_mask(mask):
    """Return a dense attention under bool `[B, L, S]`."""

    def run(arrays, cotangent):
        found = []
        for row, allowed in enumerate(mask):
            given = (each[row].astype(np.float64) for each in arrays)
            found.append(attend(*given, allowed, cotangent[row]))
        output, *gradients = (np.stack(each) for each in zip(*found, strict=True))
        return output, gradients

    return run


@pytest.mark.parametrize("window", [None, 1, 3, 16])
def test_marin_sees_each_segment_alone(window):
    """Its kernel: a valid query sees the keys from its lower bound to itself."""
    lower, valid = to_marin(segment_info(HARD_ROWS, window=window))
    assert (lower.dtype, valid.dtype) == (jnp.int32, jnp.bool_)
    np.testing.assert_array_equal(valid, HARD_ROWS > 0)
    np.testing.assert_array_equal(np.asarray(lower)[HARD_ROWS == 0], 16)
    index = np.arange(16)
    seen = (np.asarray(lower)[:, :, None] <= index) & (index <= index[:, None])
    mask = seen & np.asarray(valid)[:, :, None]
    assert_exact(through_mask(mask), HARD_ROWS, causal=True, window=window, kv_heads=2)


class Mask(NamedTuple):
    """Stands in for tokamax's class."""

    k_start: object = None
    k_end: object = None
    is_causal: bool = False


@pytest.fixture
def tokamax(monkeypatch):
    module = stand_in(monkeypatch, TOKAMAX)
    module.Mask = Mask
    return module


def through_tokamax(mask, length):
    """Read the bounds as the docstring of tokamax's `Mask` says."""
    index = np.arange(length)
    assert mask.k_start.shape[1] == 1  # for all heads
    seen = np.asarray(mask.k_start)[:, 0, :, None] <= index
    if mask.is_causal:
        seen &= index <= index[:, None]
    if mask.k_end is not None:
        seen &= index < np.asarray(mask.k_end)[:, 0, :, None]
    return through_mask(seen)


@pytest.mark.parametrize(("causal", "window"), [*SETTINGS, (False, 3)])
def test_tokamax_bounds_are_each_segment_alone(tokamax, causal, window):
    mask = to_tokamax_mask(segment_info(HARD_ROWS, causal=causal, window=window))
    assert (mask.is_causal, mask.k_end is None) == (causal, causal)
    run = through_tokamax(mask, 16)
    assert_exact(run, HARD_ROWS, causal=causal, window=window, kv_heads=2)


def test_tokamax_bounds_of_another_row_of_segments(tokamax):
    info = segment_info(QUERY_ROWS, kv_segment_ids=KEY_ROWS, causal=False)
    mode = {"causal": False, "window": None, "kv_rows": KEY_ROWS}
    run = through_tokamax(to_tokamax_mask(info), 10)
    assert_exact(run, QUERY_ROWS, kv_heads=2, **mode)


# All of them.


def test_one_compilation_for_all_batches(te, tokamax):
    traces = []

    @jax.jit
    def step(info):
        traces.append(info)
        packed = to_jax_cudnn(info, 4, 4)
        arrays = [packed["q_seqlen"], packed["kv_offsets"], *to_marin(info)]
        return [*arrays, to_te(info).sequence_descriptor, to_tokamax_mask(info).k_start]

    for rows in (HARD_ROWS, HARD_ROWS[::-1], np.zeros_like(HARD_ROWS)):
        jax.block_until_ready(step(segment_info(rows, max_segments=16)))
    assert len(traces) == 1


def cross(**settings):
    return segment_info(QUERY_ROWS, kv_segment_ids=KEY_ROWS, max_segments=4, **settings)


def reordered():
    return segment_info(HARD_ROWS, HARD_ROWS, max_segments=16, contiguous=False)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: to_jax_cudnn(segment_info(HARD_ROWS), 4, 4), "max_segments is None, but"),
        (lambda: to_jax_cudnn(segment_info(HARD_ROWS, max_segments=1), 4, 4), "at least 2"),
        (lambda: to_jax_cudnn(segment_info(HARD_ROWS[0], max_segments=3), 4, 4), r"\[B, L\]"),
        (lambda: to_jax_cudnn(segment_info(HARD_ROWS, max_segments=3), 4, 3), "does not divide"),
        (lambda: to_jax_cudnn(segment_info(HARD_ROWS, max_segments=3), 0, 1), "num_heads = 0"),
        (lambda: to_jax_cudnn(segment_info(HARD_ROWS, max_segments=3), 4, True), "not an integer"),
        (
            lambda: to_jax_cudnn(
                segment_info(HARD_ROWS, causal=False, window=2, max_segments=16), 4, 4
            ),
            "causal windows only",
        ),
        (lambda: to_jax_cudnn(reordered(), 4, 4), "reordered"),
        (lambda: to_jax_cudnn(cross(causal=True), 4, 4), "cross attention with causal or window"),
        (lambda: to_te(cross(causal=False, window=2)), "cross attention with causal or window"),
        (lambda: to_te(segment_info(HARD_ROWS)), "max_segments is None, but"),
        (lambda: to_te(segment_info(HARD_ROWS[0], max_segments=3)), r"\[B, L\]"),
        (lambda: to_te(segment_info(HARD_ROWS, max_segments=16)), "transformer_engine with its"),
        (lambda: to_tokamax_mask(reordered()), "reordered"),
        (lambda: to_tokamax_mask(cross(causal=True)), "causal=False and window=None"),
        (lambda: to_tokamax_mask(segment_info(HARD_ROWS)), "pip install tokamax"),
        (lambda: to_marin(segment_info(HARD_ROWS[0])), r"\[B, L\]"),
        (lambda: to_marin(segment_info(HARD_ROWS, causal=False)), "has causal=False"),
        (lambda: to_marin(cross(causal=True)), "has cross attention"),
        (lambda: to_marin(reordered()), "reordered"),
        (lambda: to_marin(HARD_ROWS), "to_marin: info is a ndarray. Hint: pass what segment_info"),
        (lambda: to_tokamax_mask(HARD_ROWS), "to_tokamax_mask: info is a ndarray"),
        (lambda: to_jax_cudnn(HARD_ROWS, 4, 4), "to_jax_cudnn: info is a ndarray"),
        (lambda: to_te(HARD_ROWS), "to_te: info is a ndarray"),
    ],
)
def test_what_is_refused(monkeypatch, call, message):
    for name in (TE, TOKAMAX):
        for absent in (name, name.split(".")[0]):  # as if they were not installed
            monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(sp.SeqpackError, match=message):
        call()


def test_changed_packages_are_refused(monkeypatch, te, tokamax):
    info = segment_info(HARD_ROWS, max_segments=16)
    tokamax.Mask = lambda bool_mask=None, *, is_causal=False: None
    with pytest.raises(sp.SeqpackError, match="Mask does not take k_start, k_end"):
        to_tokamax_mask(info)
    del tokamax.Mask
    with pytest.raises(sp.SeqpackError, match="Mask does not exist in the installed release"):
        to_tokamax_mask(info)
    te.SequenceDescriptor = types.SimpleNamespace(from_seqlens_and_offsets=lambda seqlens: None)
    with pytest.raises(sp.SeqpackError, match="does not take seq_offsets"):
        to_te(info)
    with pytest.raises(sp.SeqpackError, match="from_segment_ids_and_pos does not exist"):
        to_te(reordered())
    monkeypatch.setattr(cudnn, "dot_product_attention", lambda query, key, value, mask: None)
    with pytest.raises(sp.SeqpackError, match="does not take q_seqlen, kv_seqlen, q_offsets"):
        to_jax_cudnn(info, 4, 4)
    monkeypatch.delattr(cudnn, "dot_product_attention")
    with pytest.raises(sp.SeqpackError, match="dot_product_attention does not exist"):
        to_jax_cudnn(info, 4, 4)
