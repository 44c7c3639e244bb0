"""Masked language modelling of proteins, packed: `python notebooks/mask_proteins.py [--help]`.

BERT's recipe on synthetic proteins, in the vocabulary of ESM-2: of 15 % of the residues, which the
model has to guess, 80 % are replaced by `<mask>`, 10 % by a residue drawn at random, and 10 % stay.
`<cls>`, `<eos>` and padding are never among them.

`mask_residues` is all of it.  `PackedSource` calls it with one protein and a random generator that
depends on (seed, epoch, id) alone, and adds the special tokens after that.  So the masks of a
protein are other ones in every epoch, but the same for any batch size, number of hosts or workers,
and after any restart.
"""

from __future__ import annotations

import argparse

import numpy as np

import seqpack_jax as sp

# The vocabulary of ESM-2.
CLS, PAD, EOS, MASK = 0, 1, 2, 32
RESIDUES = "LAGVSERTIDPKQNFYMHWC"
FIRST = 4  # the id of L; the others follow
# In percent, about those of UniProtKB/Swiss-Prot.
SHARES = np.array([9.6, 8.3, 7.1, 6.9, 6.6, 6.7, 5.5, 5.4, 5.9, 5.5, 4.7, 5.8, 3.9, 4.1, 3.9, 2.9])
SHARES = np.append(SHARES, [2.4, 2.3, 1.1, 1.4])
RATE, MASKED, RANDOM = 0.15, 0.8, 0.1
IGNORED = -100  # a label that no loss counts


def mask_residues(tokens: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Return what the model sees of a protein, and the residues it has to guess."""
    size = len(tokens)
    chosen = rng.random(size) < RATE
    fate = rng.random(size)
    drawn = rng.integers(FIRST, FIRST + len(RESIDUES), size)
    seen = np.where(fate < MASKED, MASK, np.where(fate < MASKED + RANDOM, drawn, tokens))
    return {
        "tokens": np.where(chosen, seen, tokens).astype(np.int32),
        "labels": np.where(chosen, tokens, IGNORED).astype(np.int32),
    }


def synthetic_proteins(count: int, max_length: int, seed: int = 0) -> list[np.ndarray]:
    """Return residues as token ids, of lengths as proteins have them."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(5.5, 0.7, count), 1, max_length).astype(int)
    residues = rng.choice(len(RESIDUES), lengths.sum(), p=SHARES / SHARES.sum()) + FIRST
    return np.split(residues.astype(np.int8), lengths.cumsum()[:-1])


def pack_proteins(proteins: list[np.ndarray], max_seq_len: int, **options) -> sp.PackedSource:
    """Pack proteins, each between `<cls>` and `<eos>`, with new masks in every epoch."""
    return sp.pack_dataset(
        proteins,
        max_seq_len,
        transform=mask_residues,
        bos_id=CLS,
        eos_id=EOS,
        pad_value={"tokens": PAD, "labels": IGNORED},
        **options,
    )


def count(batch: dict[str, np.ndarray]) -> dict[str, int]:
    """Count in one batch what became of which tokens."""
    tokens, labels, real = batch["tokens"], batch["labels"], batch["segment_ids"] > 0
    chosen = labels != IGNORED
    special = real & ~chosen & ((tokens == CLS) | (tokens == EOS))
    return {
        "rows": int(real.any(axis=1).sum()),
        "proteins": int(batch["segment_ids"].max(axis=1).sum()),
        "residues": int(real.sum() - special.sum()),
        "chosen": int(chosen.sum()),
        "masked": int((chosen & (tokens == MASK)).sum()),
        "same": int((chosen & (tokens == labels)).sum()),
        "on specials": int((chosen & ((labels < FIRST) | (labels == MASK))).sum()),
        "on padding": int((chosen & ~real).sum()),
    }


def letters(tokens: np.ndarray) -> str:
    """Write tokens as one letter each."""
    names = {CLS: "<", EOS: ">", PAD: ".", MASK: "#", IGNORED: " "}
    return "".join(names.get(t) or RESIDUES[t - FIRST] for t in tokens.tolist())


def main(arguments: list[str] | None = None) -> None:
    """Pack, mask, and print what was masked, epoch by epoch."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--proteins", type=int, default=2000)
    parser.add_argument("--max-seq-len", type=int, default=1024)
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args(arguments)
    # A protein with <cls> and <eos> fills at most one row.
    proteins = synthetic_proteins(options.proteins, options.max_seq_len - 2)
    source = pack_proteins(
        proteins, options.max_seq_len, batch_size=16, seed=0, epochs=options.epochs
    )
    heads = ("epoch", "rows", "proteins", "residues", "chosen", "<mask>", "other", "same")
    print(*(f"{head:>8}" for head in heads), "  on specials  on padding")
    for epoch in range(options.epochs):
        steps = range(epoch * source.steps_per_epoch, (epoch + 1) * source.steps_per_epoch)
        counts = [count(source[step]) for step in steps]
        sums = {name: sum(one[name] for one in counts) for name in counts[0]}
        chosen = sums["chosen"]
        numbers = epoch, sums["rows"], sums["proteins"], sums["residues"]
        other = chosen - sums["masked"] - sums["same"]
        fates = [number / chosen for number in (sums["masked"], other, sums["same"])]
        shares = [chosen / sums["residues"], *fates]
        texts = [f"{number:8}" for number in numbers] + [f"{share:8.2%}" for share in shares]
        print(*texts, f"{sums['on specials']:13} {sums['on padding']:11}")
    print("\nThe end of the first row (< is <cls>, > is <eos>, # is <mask>, . is padding):")
    batch = source[0]
    last = int((batch["segment_ids"][0] > 0).sum())
    window = slice(max(0, last - 60), last + 8)
    for name in ("tokens", "labels"):
        print(f"{name:>8} {letters(batch[name][0, window])}")


if __name__ == "__main__":
    main()
