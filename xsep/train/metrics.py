"""MAP@k for pictures with several labels; top-1 and top-5 are torchmetrics' own."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class MeanAveragePrecisionAtK(Metric):
    """The mean over pictures of the average precision of their k highest scores; pictures without labels are left out.

    Of one picture with n labels it is ``sum(precision(i) for the ranks i <= k that hold a label) / min(n, k)``: 1 where
    all labels come first. torchmetrics' RetrievalMAP divides by the labels among the k instead, so that it gives 1 to a
    picture of which one label of many is found, and it keeps every score of every picture until the end. The paper
    weights each class of FastEval14k by how common it is; those weights are not published, so here all count alike.
    """

    full_state_update = False
    higher_is_better = True
    total: Tensor
    count: Tensor

    def __init__(self, k: int = 100) -> None:
        super().__init__()
        self.k = k
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, scores: Tensor, labels: Tensor) -> None:
        """scores [N, classes] of any scale; labels [N, classes], 0 or 1."""
        k = min(self.k, scores.shape[1])
        hits = labels.bool().gather(1, scores.topk(k, dim=1).indices).double()
        ranks = torch.arange(1, k + 1, device=scores.device)
        precision = hits.cumsum(1) / ranks
        wanted = labels.bool().sum(1)
        average = (precision * hits).sum(1) / wanted.clamp(1, self.k)
        self.total += average.sum()
        self.count += (wanted > 0).sum()

    def compute(self) -> Tensor:
        """Scalar, 0 to 1."""
        return (self.total / self.count).float()
