"""What tiles of tokens visit of the far store: what some of their tokens chose, upwards, with the bits of who did; and nothing else."""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("triton")

from service.kernels.gpu import tile_visits
from service.kernels.gpu.paged_attention import AttentionPlan
from tests.kernels.gpu.conftest import DEVICE, moved
from tests.kernels.sparse_batches import make_sparse


def test_visits_are_what_some_token_of_a_tile_chose() -> None:
    batch = moved(make_sparse([130, 3, 76], [60, 1, 9], refresh=1, budget=3, block_tokens=16, window=40))
    plan = AttentionPlan(batch.query_starts, batch.context_lengths, DEVICE, 40)
    work = plan.sparse(8, 2)
    # Rows 0 … 59 stand at positions 70 … 129, the last nine at 67 … 75.
    tiles = [[row for row in range(60) if (row + 70) // 8 == run] for run in range(8, 17)]
    tiles += [[row for row in range(61, 70) if (row + 6) // 8 == run] for run in (8, 9)]
    lengths = (batch.query_starts, batch.context_lengths, work.tile_ends)
    visits = tile_visits.find_visits(lengths, work.tiles, 8, batch.far)
    choices, counts, anchors = (tensor.cpu() for tensor in (batch.far.choices, batch.far.counts, batch.far.anchors))
    assert work.tiles == len(tiles) and int(visits.counts.max()) > 3
    for (tile, rows), head in itertools.product(enumerate(tiles), range(2)):
        chosen = [choices[anchors[row], head, : counts[anchors[row]]].tolist() for row in rows]
        blocks = sorted({block for one in chosen for block in one})
        readers = [sum(1 << bit for bit, one in enumerate(chosen) if block in one) for block in blocks]
        found = [tensor[tile, head, : int(visits.counts[tile, head])].tolist() for tensor in visits[:2]]
        assert found == [blocks, readers]


def test_marks_come_side_by_side_whatever_their_width() -> None:
    """Tables wider than what is gathered at a time, tiles that nobody marked, and all bits, that of the sign too."""
    width = 2 * tile_visits.GATHERED + 37
    generator = torch.Generator().manual_seed(1)
    marks = torch.randint(-(2**31), 2**31, (4, 2, width), generator=generator, dtype=torch.int64).to(torch.int32)
    marks[torch.rand(4, 2, width, generator=generator) < 0.7] = 0
    marks[1] = 0
    marks[2, 1, : tile_visits.GATHERED] = 0
    marks[3, 0, width - 1] = -(2**31)
    visits = tile_visits.gather_visits(marks.to(DEVICE), width)
    assert visits.indices.shape == (4, 2, width)
    for tile, head in itertools.product(range(4), range(2)):
        expected = marks[tile, head].nonzero()[:, 0]
        count = int(visits.counts[tile, head])
        assert visits.indices[tile, head, :count].tolist() == expected.tolist()
        assert visits.readers[tile, head, :count].tolist() == marks[tile, head, expected].tolist()


def test_a_tile_has_no_more_visits_than_its_tokens_chose() -> None:
    """The room for them is the smaller of what all may choose and what there is."""
    marks = torch.zeros(3, 2, 40, dtype=torch.int32, device=DEVICE)
    marks[:, :, [3, 39]] = 1
    visits = tile_visits.gather_visits(marks, 6)
    assert visits.indices.shape == visits.readers.shape == (3, 2, 6)
    assert (visits.counts == 2).all() and (visits.indices[..., :2].cpu() == torch.tensor([3, 39])).all()
