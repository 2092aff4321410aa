"""Every image once an epoch, in an order that the seed repeats."""

import pytest
import torch
from conftest import CPU

from engine.batches import Batches


@pytest.mark.parametrize("batch_size", [1, 2, 32, 512])
def test_batches_contain_every_image_once(batch_size):
    for size in (*range(2, 40), 127, 128, 143, 1000):
        batches = Batches(lambda batch, _: batch, 3 * torch.arange(size), batch_size, CPU, seed=0)
        for _ in range(2):
            epoch = list(batches)
            assert len(epoch) == batches.steps and min(len(batch) for batch, _ in epoch) >= 2
            assert torch.cat([batch for batch, _ in epoch]).sort().values.equal(torch.arange(size))
            assert all(labels.equal(3 * batch) for batch, labels in epoch)


def test_many_images_are_shuffled_in_blocks():
    """So a feature file that is larger than memory is not read by a seek for every row."""
    count = 300_000
    batches = Batches(lambda batch, _: batch, torch.zeros(count), 512, CPU, seed=0)
    order = torch.cat([batch for batch, _ in batches])
    assert order.sort().values.equal(torch.arange(count))
    first = order[:100_000]
    assert len((first // 64).unique()) < 2100 and first.diff().abs().median() > 10_000


def test_the_seed_and_the_epoch_determine_all_that_is_random():
    """Without what was drawn before, so that a resumed training draws the same."""

    def epoch(seed, number):
        drawn = []
        batches = Batches(lambda batch, draws: (drawn.append(draws), batch)[1], torch.zeros(100), 8, CPU, seed)
        batches.start_epoch(number)
        order = torch.cat([batch for batch, _ in batches]).tolist()
        return (*order, *torch.cat(drawn).flatten().tolist(), *torch.rand(3).tolist())

    every = [epoch(seed, number) for seed in (1, 2) for number in range(5)]
    assert every == [epoch(seed, number) for seed in (1, 2) for number in range(5)]
    for part in (slice(100), slice(100, 600), slice(600, None)):  # order, augmentation, dropout
        assert len({each[part] for each in every}) == 10
    batches = Batches(lambda batch, _: batch, torch.zeros(100), 8, CPU)
    assert torch.cat([batch for batch, _ in batches]).tolist() == list(range(100))
