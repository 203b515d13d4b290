"""The stream of sequences: everything once an epoch, decided by the position alone."""

from __future__ import annotations

import numpy as np
import pytest

from service.train.stream import TokenStream


def stream(seed: int = 0) -> TokenStream:
    return TokenStream([[10 * document + offset for offset in range(1, 8)] for document in range(1, 60)], 0, seed)


def test_documents_are_whole_and_parted_by_the_end_token() -> None:
    row = stream().tokens.tolist()
    assert row[0] == 0 and row[-1] == 0 and len(row) == len(stream()) == 59 * 8 + 1
    documents = [row[first : first + 7] for first in range(1, len(row), 8)]
    assert sorted(documents) == [[10 * document + offset for offset in range(1, 8)] for document in range(1, 60)]


def test_targets_are_the_next_tokens() -> None:
    source = stream()
    inputs, targets = source.batch(0, 4, 16)
    row = source.tokens.tolist()
    assert inputs.shape == targets.shape == (64,) and inputs.dtype == np.int64
    for sequence in range(4):
        seen, wanted = inputs[16 * sequence : 16 * sequence + 16].tolist(), targets[16 * sequence : 16 * sequence + 16].tolist()
        assert seen[1:] == wanted[:-1]
        assert any(row[start : start + 17] == [*seen, wanted[-1]] for start in range(len(row) - 16))


def test_a_batch_depends_on_the_position_alone() -> None:
    once, again = stream(), stream()
    for position in range(0, 4096, 64):
        once.batch(position, 4, 16)
    assert np.array_equal(once.batch(640, 4, 16)[0], again.batch(640, 4, 16)[0])
    whole, parts = once.batch(512, 4, 16)[0], [again.batch(512 + 32 * part, 2, 16)[0] for part in range(2)]
    assert np.array_equal(whole, np.concatenate(parts))


def test_an_epoch_shows_every_sequence_once() -> None:
    source = stream()
    per_epoch = (len(source) - 1) // 16 - 1
    inputs, _ = source.batch(0, per_epoch, 16)
    starts = {tuple(inputs[first : first + 16].tolist()) for first in range(0, len(inputs), 16)}
    assert len(starts) == per_epoch


def test_seeds_differ() -> None:
    assert not np.array_equal(stream(0).batch(0, 4, 16)[0], stream(1).batch(0, 4, 16)[0])


def test_too_few_tokens() -> None:
    with pytest.raises(ValueError, match="too few"):
        TokenStream([[1, 2, 3]], 0, 0).batch(0, 1, 16)


def test_aligned_sequences_begin_with_a_document_that_is_near() -> None:
    documents = [[10 * document + offset for offset in range(1, 8)] for document in range(1, 60)]
    aligned, plain = TokenStream(documents, 0, 0, aligned=True), TokenStream(documents, 0, 0)
    moved = 0
    for position in range(0, 16 * 24, 16):
        ours, theirs = aligned.batch(position, 1, 16)[0].tolist(), plain.batch(position, 1, 16)[0].tolist()
        # A document begins every eight tokens, and a sequence as a prompt does: with its first token, not with the end before it.
        assert ours[0] % 10 == 1 and ours[7] == 0
        begin = next(at for at, token in enumerate(theirs) if token % 10 == 1)
        assert begin < 8 and ours[: 16 - begin] == theirs[begin:]
        moved += ours != theirs
    assert moved > 12


def test_aligned_sequences_stay_where_no_document_begins() -> None:
    long = [[1000 * document + offset for offset in range(1, 400)] for document in range(1, 6)]
    aligned, plain = TokenStream(long, 0, 0, aligned=True), TokenStream(long, 0, 0)
    per_epoch = (len(plain) - 1) // 16 - 1
    pairs = [(aligned.batch(16 * at, 1, 16)[0].tolist(), plain.batch(16 * at, 1, 16)[0].tolist()) for at in range(per_epoch)]
    for ours, theirs in pairs:
        assert ours == theirs or (ours[0] % 1000 == 1 and ours[0] in theirs)
    assert sum(ours == theirs for ours, theirs in pairs) > per_epoch // 2
