"""How the arrays of a batch are called, and shifted: the styles that trainers want.

All arrays are `[B, L]`; those that a style makes are int32, save that weights are floats where a
`loss_mask` is.  What a style does not name is passed on under its own name.

* `"default"`: every feature by its name, `segment_ids` and `positions`; with several capacities
  `{feature}_segment_ids` and `{feature}_positions`.
* `"grain"`: for every feature with tokens `{feature}`, `{feature}_segment_ids` and
  `{feature}_positions`, as Grain's own packers do.
* `"maxtext"`: `inputs`, `inputs_position`, `inputs_segmentation`, `targets`, `targets_position` and
  `targets_segmentation`.  Targets are the next token of the same segment.  The last token of a
  segment has none: its target and its `targets_segmentation`, which MaxText reads as the loss mask,
  are 0.  (MaxText's own shift has the first token of the next segment there.)  A feature `targets`
  of the record is taken as it is, already aligned with the inputs.
* `"t5x"`: `decoder_input_tokens` (shifted right inside each segment, 0 first),
  `decoder_target_tokens`, `decoder_loss_weights`, `decoder_segment_ids` and `decoder_positions`;
  from capacities of `inputs` and `targets` also `encoder_input_tokens`, `encoder_segment_ids` and
  `encoder_positions`.
* `"levanter"`: `tokens`, `loss_mask` (0 on the last token of a segment, which has nothing to
  predict), `segment_ids` (from 0, -1 on padding) and `pos_ids`.
* `"hf"`: `input_ids`, `position_ids` and `labels`: the tokens, or a feature `labels`, not shifted,
  since Hugging Face models shift inside; -100 on padding and on the first token of each segment,
  which is no target of the segment before.  There is no `attention_mask`: those models find packed
  segments by their positions only when they are given none.  So each segment must start at 0;
  pieces of split sequences whose positions go on are an error.
* `"tunix"`: `input_tokens`, `input_mask`, `segment_ids` and `segment_positions`.  Tunix's losses
  take the target of a token, and its mask, one place further on; so the mask is 0 on the first
  token of each segment, which is no target of the segment before, and on padding.

A feature `loss_mask` says which *tokens* are learned, 0 on those of a prompt, say.  The trainers'
styles put it where their loss looks: shifted along with the targets of `"maxtext"` and
`"levanter"`, as it is in `"t5x"`, in `"tunix"` and beside `targets` of the record, as labels of
-100 in `"hf"`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from seqpack_jax.errors import check_choice, fail
from seqpack_jax.feeding.layout import checked_int32

__all__ = ["IGNORED_LABEL", "KEY_STYLES", "PackedFeatures", "fail_at_name", "in_style", "nested"]

IGNORED_LABEL = -100  # what Hugging Face losses leave out


class PackedFeatures(NamedTuple):
    """The arrays of a batch, before they are named in a style.

    Attributes:
        tokens: `[B, L, ...]`, by feature with tokens.
        layout_of: by feature with tokens, the feature with a capacity whose rows it shares.
        segment_ids: int32 `[B, L]`, by feature with a capacity.
        positions: int32 `[B, L]`, by feature with a capacity.
        once: what comes once per sequence, `[B, max_segments, ...]`, or per row, by name.
    """

    tokens: dict[str, NDArray[Any]]
    layout_of: dict[str, str]
    segment_ids: dict[str, NDArray[Any]]
    positions: dict[str, NDArray[Any]]
    once: dict[str, NDArray[Any]]

    def check_pads(self, caller: str, names: Iterable[str]) -> None:
        """Raise if a pad value is for a feature without padding, or one that no record has."""
        for name in names:
            if name not in self.tokens:
                comes = "comes once per sequence" if name in self.once else "is in no record"
                hint = f"features with padding are {', '.join(self.tokens)}"
                fail(caller, f"pad_value names the feature {name!r}, which {comes}", hint)


_Named = list[tuple[str, NDArray[Any]]]


def in_style(caller: str, style: str, packed: PackedFeatures) -> dict[str, Any]:
    """Return the arrays of a batch by name, in a key style; nested features as nested dicts.

    Time: O(B * L).

    Args:
        caller: the public function that an error shall name.
        style: one of `KEY_STYLES`.
        packed: the arrays.

    Raises:
        SeqpackError: the style does not know such features, or two arrays would have one name.

    Example:
        >>> ids = np.array([[1, 1, 2, 0]], np.int32)
        >>> positions = np.array([[0, 1, 0, 0]], np.int32)
        >>> tokens = {"tokens": np.array([[7, 8, 9, 0]], np.int32)}
        >>> same = {"tokens": "tokens"}
        >>> packed = PackedFeatures(tokens, same, {"tokens": ids}, {"tokens": positions}, {})
        >>> for name, array in in_style("f", "maxtext", packed).items():
        ...     print(name, array.tolist())
        inputs [[7, 8, 9, 0]]
        inputs_position [[0, 1, 0, 0]]
        inputs_segmentation [[1, 1, 2, 0]]
        targets [[8, 0, 0, 0]]
        targets_position [[0, 1, 0, 0]]
        targets_segmentation [[1, 0, 0, 0]]
    """
    named = _STYLES[check_choice(caller, "key_style", style, KEY_STYLES)](caller, packed)
    return nested(caller, [*named, *packed.once.items()])


def _default(caller: str, packed: PackedFeatures) -> _Named:
    named: _Named = list(packed.tokens.items())
    single = len(packed.segment_ids) == 1
    for name, segment_ids in packed.segment_ids.items():
        prefix = "" if single else f"{name}_"
        named.append((f"{prefix}segment_ids", segment_ids))
        named.append((f"{prefix}positions", packed.positions[name]))
    return named


def _grain(caller: str, packed: PackedFeatures) -> _Named:
    return [each for name in packed.tokens for each in _as_grain(packed, name)]


def _as_grain(packed: PackedFeatures, name: str) -> _Named:
    lead = packed.layout_of[name]
    segment_ids, positions = packed.segment_ids[lead], packed.positions[lead]
    if name != lead:  # a step may write into an array, and must not change two
        segment_ids, positions = segment_ids.copy(), positions.copy()
    return [
        (name, packed.tokens[name]),
        (f"{name}_segment_ids", segment_ids),
        (f"{name}_positions", positions),
    ]


def _maxtext(caller: str, packed: PackedFeatures) -> _Named:
    lead = _only_capacity(caller, "maxtext", packed)
    tokens, segment_ids = _integers(caller, "maxtext", packed, lead), packed.segment_ids[lead]
    learned = _loss_mask(caller, packed)
    own = "targets" if "targets" in packed.tokens and lead != "targets" else None
    if own is not None:
        targets = _integers(caller, "maxtext", packed, own)
        has_target = segment_ids > 0
    else:
        has_target = _goes_on(segment_ids)
        targets = np.where(segment_ids == 0, tokens, 0)
        np.copyto(targets[:, :-1], tokens[:, 1:], where=has_target[:, :-1])
        learned = None if learned is None else _shift_left(learned)
    if learned is not None:
        has_target &= learned != 0
    positions = packed.positions[lead]
    return [
        ("inputs", tokens),
        ("inputs_position", positions),
        ("inputs_segmentation", segment_ids),
        ("targets", targets),
        ("targets_position", positions.copy()),
        ("targets_segmentation", segment_ids * has_target),
        *_others(packed, (lead, own, "loss_mask")),
    ]


def _t5x(caller: str, packed: PackedFeatures) -> _Named:
    lead, encoder = next(iter(packed.segment_ids)), None
    if len(packed.segment_ids) > 1:
        encoder, lead = "inputs", "targets"
        if set(packed.segment_ids) != {encoder, lead}:
            problem = f"key_style 't5x' and capacities of {', '.join(packed.segment_ids)}"
            fail(caller, problem, "give one feature a capacity, or the two inputs and targets")
    tokens, segment_ids = _integers(caller, "t5x", packed, lead), packed.segment_ids[lead]
    shifted = np.zeros_like(tokens)
    np.copyto(shifted[:, 1:], tokens[:, :-1], where=_goes_on(segment_ids)[:, :-1])
    weights: NDArray[Any] = (segment_ids > 0).astype(np.int32)
    learned = _loss_mask(caller, packed)
    if learned is not None:
        weights = _weights(segment_ids > 0, learned)
    named: _Named = []
    if encoder is not None:
        named = [
            ("encoder_input_tokens", _integers(caller, "t5x", packed, encoder)),
            ("encoder_segment_ids", packed.segment_ids[encoder]),
            ("encoder_positions", packed.positions[encoder]),
        ]
    return [
        *named,
        ("decoder_input_tokens", shifted),
        ("decoder_target_tokens", tokens),
        ("decoder_loss_weights", weights),
        ("decoder_segment_ids", segment_ids),
        ("decoder_positions", packed.positions[lead]),
        *_others(packed, (lead, encoder, "loss_mask")),
    ]


def _levanter(caller: str, packed: PackedFeatures) -> _Named:
    lead = _only_capacity(caller, "levanter", packed)
    tokens, segment_ids = _integers(caller, "levanter", packed, lead), packed.segment_ids[lead]
    learned, has_target = _loss_mask(caller, packed), _goes_on(segment_ids)
    loss_mask: NDArray[Any] = has_target.astype(np.int32)
    if learned is not None:
        loss_mask = _weights(has_target, _shift_left(learned))
    return [
        ("tokens", tokens),
        ("loss_mask", loss_mask),
        ("segment_ids", segment_ids - np.int32(1)),
        ("pos_ids", packed.positions[lead]),
        *_others(packed, (lead, "loss_mask")),
    ]


def _hf(caller: str, packed: PackedFeatures) -> _Named:
    lead = _only_capacity(caller, "hf", packed)
    tokens, segment_ids = _integers(caller, "hf", packed, lead), packed.segment_ids[lead]
    own = "labels" if "labels" in packed.tokens and lead != "labels" else None
    is_target = _follows(segment_ids)
    firsts = packed.positions[lead][(segment_ids > 0) & ~is_target]
    if firsts.any():
        problem = f"key_style 'hf' and a segment whose positions start at {firsts[firsts != 0][0]}"
        hint = "its models find segments by positions of 0: split with positions='restart'"
        fail(caller, problem, hint)
    learned = _loss_mask(caller, packed)
    if learned is not None:
        is_target &= learned != 0
    labels = tokens if own is None else _integers(caller, "hf", packed, own)
    return [
        ("input_ids", tokens),
        ("position_ids", packed.positions[lead]),
        ("labels", np.where(is_target, labels, np.int32(IGNORED_LABEL))),
        *_others(packed, (lead, own, "loss_mask")),
    ]


def _tunix(caller: str, packed: PackedFeatures) -> _Named:
    lead = _only_capacity(caller, "tunix", packed)
    segment_ids, learned = packed.segment_ids[lead], _loss_mask(caller, packed)
    is_target = _follows(segment_ids)
    input_mask: NDArray[Any] = is_target.astype(np.int32)
    if learned is not None:
        input_mask = _weights(is_target, learned)
    return [
        ("input_tokens", _integers(caller, "tunix", packed, lead)),
        ("input_mask", input_mask),
        ("segment_ids", segment_ids),
        ("segment_positions", packed.positions[lead]),
        *_others(packed, (lead, "loss_mask")),
    ]


_STYLES: dict[str, Callable[[str, PackedFeatures], _Named]] = {
    "default": _default,
    "grain": _grain,
    "maxtext": _maxtext,
    "t5x": _t5x,
    "levanter": _levanter,
    "hf": _hf,
    "tunix": _tunix,
}
KEY_STYLES = tuple(_STYLES)


def _only_capacity(caller: str, style: str, packed: PackedFeatures) -> str:
    """Return the name of the one feature with a capacity."""
    if len(packed.segment_ids) != 1:
        problem = f"key_style {style!r} and capacities of {', '.join(packed.segment_ids)}"
        fail(caller, problem, "give one feature a capacity; the others share its rows")
    return next(iter(packed.segment_ids))


def _integers(caller: str, style: str, packed: PackedFeatures, name: str) -> NDArray[np.int32]:
    array = packed.tokens[name]
    if array.ndim != 2 or array.dtype.kind not in "iu":
        problem = f"feature {name!r} is {array.dtype} {list(array.shape)}"
        fail(caller, f"{problem}, but key_style {style!r} has integers [B, L]", "use 'default'")
    return checked_int32(caller, name, array)


def _loss_mask(caller: str, packed: PackedFeatures) -> NDArray[Any] | None:
    """Return the feature that says which tokens are learned, if there is one."""
    mask = packed.tokens.get("loss_mask")
    if mask is not None and (mask.ndim != 2 or mask.dtype.kind == "c"):
        problem = f"feature 'loss_mask' is {mask.dtype} {list(mask.shape)}"
        fail(caller, problem, "give each token one number, or name the feature otherwise")
    return mask


def _goes_on(segment_ids: NDArray[Any]) -> NDArray[np.bool_]:
    """Tell which tokens have a next one in their segment."""
    goes_on = np.zeros(segment_ids.shape, np.bool_)
    np.equal(segment_ids[:, 1:], segment_ids[:, :-1], out=goes_on[:, :-1])
    goes_on &= segment_ids > 0
    return goes_on


def _follows(segment_ids: NDArray[Any]) -> NDArray[np.bool_]:
    """Tell which tokens have one before them in their segment."""
    follows = np.zeros(segment_ids.shape, np.bool_)
    follows[:, 1:] = _goes_on(segment_ids)[:, :-1]
    return follows


def _shift_left(array: NDArray[Any]) -> NDArray[Any]:
    shifted = np.zeros_like(array)
    shifted[:, :-1] = array[:, 1:]
    return shifted


def _weights(has_target: NDArray[np.bool_], learned: NDArray[Any]) -> NDArray[Any]:
    """Return the weights of tokens, 0 where there is no target: int32, or floats if they are."""
    dtype = np.dtype(np.int32) if learned.dtype.kind in "biu" else learned.dtype
    return np.where(has_target, learned, 0).astype(dtype)


def _others(packed: PackedFeatures, taken: tuple[str | None, ...]) -> _Named:
    return [(name, array) for name, array in packed.tokens.items() if name not in taken]


def fail_at_name(caller: str, name: str) -> NoReturn:
    """Raise, for two arrays would have one name."""
    problem = f"a feature is named {name!r}, as an array of the batch"
    fail(caller, problem, "give the feature another name")


def nested(caller: str, named: _Named) -> dict[str, Any]:
    """Put arrays into dicts by name: "a/b" is entry "b" of entry "a"."""
    batch: dict[str, Any] = {}
    for name, array in named:
        inner, last = batch, name
        if "/" in name:
            *path, last = name.split("/")
            for key in path:
                inner = inner.setdefault(key, {})
                if not isinstance(inner, dict):
                    break
        if not isinstance(inner, dict) or last in inner:
            fail_at_name(caller, name)
        inner[last] = array
    return batch
