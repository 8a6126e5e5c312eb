"""Which picture is seen when: every one once an epoch, the same steps on any number of devices, and no memory."""

from __future__ import annotations

import pytest

from xsep.train.order import Draw, EpochBatches, Geometry, Share, mixed


def epoch(count: int, geometry: Geometry, rank: int = 0, number: int = 0, seed: int = 3) -> list[list[int]]:
    order = EpochBatches(count, geometry, rank, seed)
    order.set_epoch(number)
    return [[draw.number for draw in batch] for batch in order]


def test_each_picture_once_in_an_order_of_its_epoch() -> None:
    first, second = epoch(35, Geometry(5)), epoch(35, Geometry(5), number=1)
    for batches in (first, second):
        assert sorted(i for batch in batches for i in batch) == list(range(35))
    assert first != second
    assert first == epoch(35, Geometry(5)) and first != epoch(35, Geometry(5), seed=4)
    assert all(draw.epoch == 1 for batch in EpochBatches(35, Geometry(5), 0, 3, epoch=1) for draw in batch)


def test_devices_and_accumulation_share_the_same_steps() -> None:
    """37 pictures by steps of 12: three steps; the one left over is left out."""
    alone = epoch(37, Geometry(12))
    accumulated = epoch(37, Geometry(4, accumulate=3))
    ranks = [epoch(37, Geometry(4, world=3), rank) for rank in range(3)]
    both = [epoch(37, Geometry(2, world=3, accumulate=2), rank) for rank in range(3)]
    assert [len(alone), len(accumulated), len(ranks[0]), len(both[0])] == [3, 9, 3, 6]
    for step in range(3):
        assert alone[step] == [i for batch in accumulated[3 * step : 3 * step + 3] for i in batch]
        assert alone[step] == [i for rank in ranks for i in rank[step]]
        assert sorted(alone[step]) == sorted(i for rank in both for b in rank[2 * step : 2 * step + 2] for i in b)


@pytest.mark.parametrize("done", [0, 1, 5], ids=lambda n: f"{n}_done")
def test_resumed_in_an_epoch(done: int) -> None:
    geometry = Geometry(3, world=2)
    whole = EpochBatches(41, geometry, 1, 9, epoch=4)
    resumed = EpochBatches(41, geometry, 1, 9, epoch=4, start=done)
    assert len(resumed) == len(whole) == 6
    assert list(resumed) == list(whole)[done:]
    resumed.set_epoch(5)
    whole.set_epoch(5)
    assert list(resumed) == list(whole)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_shares_of_validation(world: int) -> None:
    """As many batches on each device, every picture on one of them, blanks for the rest."""
    shares = [list(Share(17, 4, world, rank)) for rank in range(world)]
    assert {len(share) for share in shares} == {-(-17 // (4 * world))}
    seen = [draw for share in shares for batch in share for draw in batch]
    assert sorted(draw.number for draw in seen if draw.number >= 0) == list(range(17))
    assert seen.count(Draw(0, -1)) == len(seen) - 17


def test_seeds_are_mixed() -> None:
    seeds = {mixed(a, b, c) for a in range(12) for b in range(12) for c in range(12)}
    assert len(seeds) == 12**3 and all(0 <= s < 2**63 for s in seeds)
    flipped = [bin(mixed(5, 1 << bit) ^ mixed(5, 0)).count("1") for bit in range(64)]
    assert min(flipped) > 15 and max(flipped) < 48  # about half of the 63 bits, whichever bit is changed
