"""Slow and obvious versions of what the library does; fast functions must equal them."""

from collections.abc import Callable


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
