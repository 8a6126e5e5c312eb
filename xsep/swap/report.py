"""What a swap did, for people and for programs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


class Swapped(NamedTuple):
    """One chain, by module names within the model."""

    host: str  # in whose forward it runs as one; "" for the model itself
    conv_dw: str
    conv_pw: str
    members: tuple[str, ...]  # all that run as one, in their order, the two convolutions among them


class Missed(NamedTuple):
    """A depthwise convolution that was left alone."""

    name: str
    reason: str


@dataclass
class SwapReport:
    """What :func:`xsep.swap_separable_convs` swapped, and why each other depthwise convolution was left alone."""

    swapped: list[Swapped] = field(default_factory=list)
    missed: list[Missed] = field(default_factory=list)

    def __len__(self) -> int:
        """How many pairs were swapped."""
        return len(self.swapped)

    def __bool__(self) -> bool:
        return True

    def __str__(self) -> str:
        lines = [f"{_count(len(self.swapped), 'separable convolution')} swapped"]
        for s in self.swapped:
            lines.append(f"  {' + '.join(s.members)}")
        if not self.swapped and not self.missed:
            lines[0] += ": the model has no nn.Conv2d whose groups are its input channels"
        if self.missed:
            lines.append(f"{_count(len(self.missed), 'depthwise convolution')} left alone")
            for m in self.missed:
                lines.append(f"  {m.name}: {m.reason}")
        return "\n".join(lines)


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"
