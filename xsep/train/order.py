"""Which picture is seen when and by whom: functions of seed, epoch and step, so that nothing needs to be remembered.

A step's pictures are a stretch of the epoch's permutation, whatever the number of devices: with as many pictures a
step, one process, several, and one that accumulates batches see the same steps. A run that is resumed in the middle of
an epoch goes on behind the step at which it was saved.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.utils.data import Sampler

#: The odd 64-bit constant of the golden ratio, which splitmix64 (Steele, Lea, Flood 2014) steps by.
GOLDEN, MASK = 0x9E3779B97F4A7C15, 2**64 - 1


def mixed(*numbers: int) -> int:
    """A seed of 63 bits in which every bit depends on every number, by splitmix64's finaliser."""
    state = 0
    for number in numbers:
        state = (state ^ (number & MASK)) + GOLDEN & MASK
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & MASK
        state ^= state >> 31
    return state >> 1


class Draw(NamedTuple):
    """One picture at one time; number -1 is a blank that fills up a batch."""

    epoch: int
    number: int


class Geometry(NamedTuple):
    """How a step's pictures are shared out."""

    batch: int  # pictures a device and batch
    world: int = 1  # devices of all machines
    accumulate: int = 1  # batches a device and step

    @property
    def global_batch(self) -> int:
        """Pictures a step."""
        return self.batch * self.world * self.accumulate


class EpochBatches(Sampler[list[Draw]]):
    """A device's batches of one epoch after the other, in an order that each epoch draws anew.

    What is left over at the end of the permutation, less than a step, is left out, and is other pictures each time.

    Args:
        count: pictures in the data set.
        geometry: how they are shared out.
        rank: of this device.
        seed: of the permutations.
        epoch: the one to begin with.
        start: batches of that epoch to leave out, as seen already.
    """

    def __init__(self, count: int, geometry: Geometry, rank: int, seed: int, epoch: int = 0, start: int = 0) -> None:
        self.count, self.geometry, self.rank, self.seed = count, geometry, rank, seed
        self.epoch = self.first = epoch
        self.start = start

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return self.count // self.geometry.global_batch * self.geometry.accumulate

    def __iter__(self) -> Iterator[list[Draw]]:
        generator = torch.Generator().manual_seed(mixed(self.seed, self.epoch))
        order = torch.randperm(self.count, generator=generator).tolist()
        batch, world, _ = self.geometry
        for i in range(self.start if self.epoch == self.first else 0, len(self)):
            begin = (i * world + self.rank) * batch
            yield [Draw(self.epoch, index) for index in order[begin : begin + batch]]


class Share(Sampler[list[Draw]]):
    """A device's share of all pictures in order, filled up with blanks: every device has as many batches."""

    def __init__(self, count: int, batch: int, world: int, rank: int) -> None:
        self.count, self.batch, self.world, self.rank = count, batch, world, rank

    def __len__(self) -> int:
        return -(-self.count // (self.batch * self.world))

    def __iter__(self) -> Iterator[list[Draw]]:
        for i in range(len(self)):
            begin = (i * self.world + self.rank) * self.batch
            yield [Draw(0, j if j < self.count else -1) for j in range(begin, begin + self.batch)]
