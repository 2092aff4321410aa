"""Every image once an epoch, in an order that the seed repeats."""

import pytest
import torch
from conftest import CPU

from engine.batches import Batches


@pytest.mark.parametrize("batch_size", [1, 2, 32, 512])
def test_batches_contain_every_image_once(batch_size):
    for size in (*range(2, 40), 127, 128, 143, 1000):
        batches = Batches(lambda batch, _: (batch, batch), 3 * torch.arange(size), batch_size, CPU, seed=0)
        for _ in range(2):
            epoch = list(batches)
            assert len(epoch) == batches.steps and min(len(batch) for batch, _ in epoch) >= 2
            assert torch.cat([batch for batch, _ in epoch]).sort().values.equal(torch.arange(size))
            assert all(labels.equal(3 * batch) for batch, labels in epoch)


def test_many_images_are_shuffled_in_blocks():
    """So a feature file that is larger than memory is not read by a seek for every row."""
    count = 300_000
    batches = Batches(lambda batch, _: (batch, batch), torch.zeros(count), 512, CPU, seed=0)
    order = torch.cat([batch for batch, _ in batches])
    assert order.sort().values.equal(torch.arange(count))
    first = order[:100_000]
    assert len((first // 64).unique()) < 2100 and first.diff().abs().median() > 10_000


def test_a_seed_determines_the_orders():
    def epochs(seed):
        batches = Batches(lambda batch, _: (batch, batch), torch.zeros(100), 8, CPU, seed)
        return [torch.cat([batch for batch, _ in batches]).tolist() for _ in range(3)]

    assert epochs(1) == epochs(1) != epochs(2)
    assert len(set(map(tuple, epochs(1)))) == 3  # every epoch has another order
    assert epochs(None) == [list(range(100))] * 3
