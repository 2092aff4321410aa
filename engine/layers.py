"""What does a classifier read of a backbone? Levels and averages, and layers that torch.nn lacks."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def stage_ends(features: nn.Module) -> list[int]:
    """The layers at which a stage ends: blocks of layers, poolings, the last layer. Empty if it is not a sequence."""
    if not isinstance(features, nn.Sequential):
        return []
    ends = {i for i, layer in enumerate(features) if any(layer.children()) or "Pool" in type(layer).__name__}
    return sorted(ends | {len(features) - 1})


def run_layers(layers: Iterable[nn.Module], levels: list[int], maps: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
    """Runs layers, counted from `first`, on maps. Returns the last maps (B, C, H, W) and the averages (B, L).

    These are of every layer in `levels`, over each quarter of the image. Reading early layers is an idea from
    Head2Toe (Evci et al. 2022, arXiv 2201.03529).
    """
    averaged = [maps.new_empty(maps.shape[0], 0)]  # not len(maps), which would fix the batch size of an export
    for i, layer in enumerate(layers, first):
        maps = layer(maps)
        if i in levels:
            averaged.append(averages(maps, 2))
    return maps, torch.cat(averaged, dim=1)


def averages(maps: Tensor, parts: int) -> Tensor:
    """Averages over parts x parts areas of the image: (B, C, H, W) -> (B, C * parts * parts)"""
    return F.adaptive_avg_pool2d(maps, parts).flatten(1)


class Standardize(nn.Module):
    """Subtracts the mean of each feature and divides by its standard deviation, as they were in the images of `fit`."""

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))

    def fit(self, features: Tensor) -> None:
        self.mean.copy_(features.mean(dim=0))
        self.std.copy_((features.var(dim=0, correction=0) + 1e-5).sqrt())

    def forward(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.std


class RandomProjection(nn.Module):
    """Adds each feature, with a random sign, to one of `size` sums, which keeps distances and angles approximately.

    This is a count sketch (Charikar et al. 2002).
    """

    def __init__(self, width: int, size: int, generator: torch.Generator | None = None):
        super().__init__()
        self.size = size
        self.register_buffer("bucket", torch.randint(size, (width,), generator=generator))
        self.register_buffer("sign", 2.0 * torch.randint(2, (width,), generator=generator) - 1)

    def forward(self, features: Tensor) -> Tensor:
        """(B, width) -> (B, size)"""
        return features.new_zeros(len(features), self.size).index_add(1, self.bucket, features * self.sign)
