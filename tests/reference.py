"""Slow and obvious versions of what the library does; fast functions must equal them."""

from collections.abc import Callable
from fractions import Fraction
from functools import partial
from math import ceil


def pack_decreasing(
    lengths: list[int],
    max_seq_len: int,
    max_segments: int | None,
    choose: Callable[[list[tuple[int, int, int]]], int],
) -> list[list[int]]:
    """Place the longest first; `choose` picks among `(room, segments, bin)` of bins with room."""
    bins: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        fitting = [
            (max_seq_len - sum(held), len(held), index)
            for index, held in enumerate(bins)
            if sum(held) + length <= max_seq_len
            and (max_segments is None or len(held) < max_segments)
        ]
        if fitting:
            bins[choose(fitting)].append(length)
        else:
            bins.append([length])
    return bins


def first_fit_decreasing(lengths, max_seq_len, max_segments=None):
    return pack_decreasing(lengths, max_seq_len, max_segments, lambda fit: fit[0][2])


def best_fit_decreasing(lengths, max_seq_len, max_segments=None):
    """Least room; among equal rooms the bin with the most segments, then the oldest."""
    return pack_decreasing(
        lengths, max_seq_len, max_segments, lambda fit: min((r, -s, b) for r, s, b in fit)[2]
    )


def worst_fit_decreasing(lengths, max_seq_len, max_segments=None):
    """Most room; among equal rooms the bin with the most segments, then the oldest."""
    return pack_decreasing(
        lengths, max_seq_len, max_segments, lambda fit: min((-r, -s, b) for r, s, b in fit)[2]
    )


def next_fit(lengths, max_seq_len, max_segments=None):
    """Bins of indices, in input order."""
    bins: list[list[int]] = []
    for index, length in enumerate(lengths):
        held = bins[-1] if bins else []
        room = sum(lengths[i] for i in held) + length <= max_seq_len
        if bins and room and (max_segments is None or len(held) < max_segments):
            held.append(index)
        else:
            bins.append([index])
    return bins


def longest_prefix(lengths, max_seq_len, rows):
    """The longest prefix of a stream, at most the volume of `rows`, that best fit places there.

    Best fit is not quite monotone, so this is an upper bound for a search that bisects.
    """
    longest = 0
    for size in range(len(lengths) + 1):
        if sum(lengths[:size]) > rows * max_seq_len:
            break
        if len(best_fit_decreasing(lengths[:size], max_seq_len)) <= rows:
            longest = size
    return longest


def rows_of(bins, sequences, max_seq_len, pad_value=0):
    """Tokens, segment ids and positions of each bin, token by token."""
    tokens, segment_ids, positions = [], [], []
    for held in bins:
        row = [pad_value] * max_seq_len, [0] * max_seq_len, [0] * max_seq_len
        place = 0
        for segment, index in enumerate(held, start=1):
            for position, token in enumerate(sequences[index]):
                row[0][place], row[1][place], row[2][place] = token, segment, position
                place += 1
        tokens.append(row[0])
        segment_ids.append(row[1])
        positions.append(row[2])
    return tokens, segment_ids, positions


def over_length_ids(lengths, max_seq_len, policy):
    """`{id: (sequence, first token, last token + 1)}` of all that a policy packs.

    Where the window of "crop" starts is drawn later; here it is the front.
    """
    packed = {}
    next_id = len(lengths)
    for index, length in enumerate(lengths):
        if length <= max_seq_len:
            packed[index] = (index, 0, length)
        elif policy.action in ("truncate", "crop"):
            packed[index] = (index, 0, max_seq_len)
        elif policy.action == "truncate_left":
            packed[index] = (index, length - max_seq_len, length)
        elif policy.action == "split":
            start = stop = 0
            while stop < length:
                stop = min(start + max_seq_len, length)
                if stop - start >= policy.min_tail:
                    packed[next_id] = (index, start, stop)
                    next_id += 1
                start = stop - policy.overlap
    return packed


def over_length_report(lengths, max_seq_len, policy):
    """What a policy touched, by counting how often each token is packed."""
    packed = over_length_ids(lengths, max_seq_len, policy)
    uses = [[0] * length for length in lengths]
    for index, start, stop in packed.values():
        for token in range(start, stop):
            uses[index][token] += 1
    long = [length for length in lengths if length > max_seq_len]
    return (
        policy.action,
        len(long),
        sum(long),
        sum(use == 0 for tokens in uses for use in tokens),
        sum(use - 1 for tokens in uses for use in tokens if use > 1),
        sum(identity >= len(lengths) for identity in packed),
    )


def fewest_bins(lengths, max_seq_len, max_segments=None):
    """The optimum, for a dozen lengths: the longest goes into each different bin, or a new one."""
    order = sorted(lengths, reverse=True)
    best = len(order)
    seen = set()

    def place(index, bins):  # bins: the rooms and segments of those open, sorted
        nonlocal best
        if len(bins) >= best or (index, bins) in seen:
            return
        seen.add((index, bins))
        if index == len(order):
            best = len(bins)
            return
        for room, segments in {*bins, (max_seq_len, 0)}:
            if room >= order[index] and (max_segments is None or segments < max_segments):
                others = list(bins)
                if (room, segments) in others:
                    others.remove((room, segments))
                placed = (room - order[index], segments + 1)
                place(index + 1, tuple(sorted([*others, placed])))

    place(0, ())
    return best


def all_bins(max_seq_len, max_segments=None, longest=None):
    """Every descending tuple of lengths that fits a bin."""
    bins = [()]
    if max_segments != 0:
        for first in range(1, min(longest or max_seq_len, max_seq_len) + 1):
            fewer = None if max_segments is None else max_segments - 1
            bins += [(first, *rest) for rest in all_bins(max_seq_len - first, fewer, first)]
    return bins


def martello_toth(lengths, max_seq_len):
    """L2, as Martello and Toth (1990) write it: J3 beyond the rooms of J2."""
    best = 0
    for alpha in range(max_seq_len // 2 + 1):
        j1 = [n for n in lengths if n > max_seq_len - alpha]
        j2 = [n for n in lengths if max_seq_len - alpha >= n and 2 * n > max_seq_len]
        j3 = [n for n in lengths if max_seq_len >= 2 * n and n >= alpha]
        over = sum(j3) - (len(j2) * max_seq_len - sum(j2))
        best = max(best, len(j1) + len(j2) + max(0, ceil(Fraction(over, max_seq_len))))
    return best


def whole_or_nothing(least, weigh, length, capacity):
    """U^(epsilon), and another function of what it leaves as it is."""
    if length < least:
        return Fraction(0)
    return Fraction(1) if length > capacity - least else weigh(length, capacity)


def share(length, capacity):
    return Fraction(length, capacity)


def lueker(k):
    """u^(k) of Lueker (1983)."""

    def weigh(length, capacity):
        parts = Fraction(length * (k + 1), capacity)
        return Fraction(length, capacity) if parts.denominator == 1 else Fraction(int(parts), k)

    return weigh


def fekete_schepers(least):
    """phi^(epsilon) of Fekete and Schepers (2001)."""

    def weigh(length, capacity):
        if 2 * length > capacity:
            return 1 - Fraction((capacity - length) // least, capacity // least)
        return Fraction(int(length >= least), capacity // least)

    return weigh


def carlier(step):
    """f_CCM,1 of the survey of Clautiaux, Alves and Valerio de Carvalho (2010)."""

    def weigh(length, capacity):
        if 2 * length > capacity:
            return 1 - Fraction((capacity - length) // step, capacity // step)
        if 2 * length == capacity:
            return Fraction(1, 2)
        return Fraction(length // step, capacity // step)

    return weigh


def burdet_johnson(step):
    """f_BJ,1 of the same survey, with the parameter capacity / step."""

    def weigh(length, capacity):
        parts, parameter = Fraction(length, step), Fraction(capacity, step)
        rest, spare = parts - int(parts), parameter - int(parameter)
        return (int(parts) + max(Fraction(0), rest - spare) / (1 - spare)) / int(parameter)

    return weigh


def beside_long(least, max_segments):
    """phi^(epsilon) with a cap: what fits beside a long sequence, by tokens and by number."""

    def weigh(length, capacity):
        most = max(1, min(max_segments, capacity // least))
        if 2 * length > capacity:
            return 1 - Fraction(min(most - 1, (capacity - length) // least), most)
        return Fraction(int(length >= least), most)

    return weigh


def dual_feasible_functions(capacity, thresholds=None, steps=None, retried=None):
    """All that `lower_bound` may try without a cap, for small capacities by every parameter."""
    half = (capacity + 1) // 2
    thresholds = range(1, half + 1) if thresholds is None else [*thresholds, half]
    steps = range(1, capacity // 2 + 1) if steps is None else steps
    inner = [lueker(k) for k in range(1, min(32, capacity - 1) + 1)]
    inner += [burdet_johnson(step) for step in (steps if retried is None else retried)]
    cut = [partial(whole_or_nothing, least, each) for least in thresholds for each in inner]
    alone = [kind(step) for step in steps for kind in (carlier, burdet_johnson)]
    return cut + alone + [fekete_schepers(least) for least in thresholds if 2 * least <= capacity]


def capped_functions(capacity, max_segments, thresholds=None):
    half = (capacity + 1) // 2
    thresholds = range(1, half + 1) if thresholds is None else [*thresholds, half]
    return [beside_long(least, max_segments) for least in thresholds]


def weighed(functions, counts, capacity):
    """The best bound of some functions: the sum of all weights, rounded up."""
    return max(
        (ceil(sum(c * weigh(n, capacity) for n, c in counts.items())) for weigh in functions),
        default=0,
    )
