"""Layers that torch.nn lacks."""

import torch
import torch.nn.functional as F
from torch import nn

from engine.layers import RandomProjection, Standardize, run_layers, stage_ends

LAYERS = nn.Sequential(
    nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Sequential(nn.Conv2d(4, 5, 1)), nn.MaxPool2d(2), nn.Conv2d(5, 6, 1), nn.ReLU()
)


def test_stages_end_at_blocks_poolings_and_the_last_layer():
    assert stage_ends(LAYERS) == [2, 3, 5]
    assert stage_ends(nn.Conv2d(3, 4, 1)) == []


def test_run_layers_averages_each_quarter_of_each_level():
    images = torch.randn(2, 3, 8, 8)
    maps, averaged = run_layers(LAYERS, [2, 3], images)
    assert maps.equal(LAYERS(images))
    expected = []
    for end, half in ((3, 4), (4, 2)):
        level = LAYERS[:end](images).unflatten(2, (2, half)).unflatten(4, (2, half))  # (2, 5, 2, half, 2, half)
        expected.append(level.mean(dim=(3, 5)).flatten(1))
    assert torch.allclose(averaged, torch.cat(expected, dim=1), atol=1e-6)


def test_standardize_and_project():
    random = torch.Generator().manual_seed(0)
    features = 5 + 3 * torch.randn(200, 2000, generator=random)
    scale = Standardize(2000)
    scale.fit(features)
    scaled = scale(features)
    assert scaled.mean(dim=0).abs().max() < 1e-4 and (scaled.std(dim=0, correction=0) - 1).abs().max() < 1e-4
    scaled = torch.cat([scaled, scaled + torch.randn(200, 2000, generator=random)])
    before, after = (F.normalize(rows) for rows in (scaled, RandomProjection(2000, 256, random)(scaled)))
    assert (before @ before.T - after @ after.T).abs().mean() < 0.06  # 1 / 256 ** 0.5
