"""How do features or images come in batches? In a new order each epoch; under torchrun each process gets a share."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

from engine.device import available_cpus
from engine.distributed import gather, rank, world_size
from engine.features import Features
from engine.images import Images, augment, preprocess, read_image, reading_arguments

# Input: the indices (B,) of a batch, and random numbers (B, 5) for augmentation or None. Output: the inputs on the
# device.
Loader = Callable[[Tensor, Tensor | None], Tensor]


def feature_loader(features: Features | Tensor, device: torch.device) -> Loader:
    """Loads rows of features (N, width)."""
    if device.type == "cuda":
        with suppress(torch.OutOfMemoryError):  # all of them on the GPU, so that no step waits for a copy
            blocks = torch.arange(len(features)).split(4096)
            features = torch.cat([features[block].to(device) for block in blocks])

    def load(batch: Tensor, draws: Tensor | None) -> Tensor:
        chosen = batch.to(features.device) if isinstance(features, Tensor) else batch
        return features[chosen].to(device, torch.float32)

    return load


class ImageLoader:
    """Loads preprocessed images (B, 3, S, S), augmented while training. Raises ImageError if one cannot be read."""

    def __init__(self, images: Images, preprocessing: dict, device: torch.device):
        self.images, self.preprocessing, self.device = images, preprocessing, device
        self.pool = ThreadPoolExecutor(min(16, available_cpus()))

    def read(self, i: int, draws: Tensor | None) -> Tensor:
        image = read_image(self.images.items[i], *reading_arguments(self.preprocessing))
        return image if draws is None else augment(image, draws, self.preprocessing["mean"])

    def __call__(self, batch: Tensor, draws: Tensor | None) -> Tensor:
        images = list(self.pool.map(self.read, batch.tolist(), [None] * len(batch) if draws is None else draws))
        return preprocess(images, self.preprocessing, self.device)


class Batches:
    """Inputs and labels in batches on the device. With a seed, every epoch has another order.

    A small set gets smaller batches, so that an epoch has about 16 steps of 8 images or more. The remainder is spread
    over all batches, which may make them a little larger than `batch_size`. If `shared`, each process of torchrun gets
    its share of every batch. There must be at least as many images as processes.
    """

    def __init__(
        self,
        load: Loader,
        labels: Tensor,
        batch_size: int,
        device: torch.device,
        seed: int | None = None,
        shared: bool = False,
    ):
        self.load, self.labels, self.device, self.seed = load, labels.to(device), device, seed
        self.progress: Callable[[int], object] = lambda images: None  # called with the size of each finished batch
        self.process, self.processes = (rank(), world_size()) if shared else (0, 1)
        size = max(2, self.processes, min(batch_size, max(8, len(labels) // 16)))
        self.steps = max(1, len(labels) // size)
        self.mean_size = len(labels) / self.steps / self.processes  # in this process
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)

    def start_epoch(self, epoch: int) -> None:
        """Seeds all that is random in an epoch, so that a resumed training draws the same numbers.

        The order and the augmentation are the same in all processes of torchrun; dropout differs.
        """
        # a hash, because torch uses only 32 bits of a seed
        order, *dropout = np.random.SeedSequence([self.seed, epoch]).generate_state(1 + self.processes).tolist()
        self.generator = torch.Generator().manual_seed(order)
        torch.manual_seed(dropout[self.process])

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        size = len(self.labels)
        order = torch.arange(size) if self.generator is None else shuffled(size, self.generator)
        labels = self.labels[order.to(self.device)].tensor_split(self.steps)
        for inputs, labels_of_all in zip(self._loaded(order.tensor_split(self.steps)), labels, strict=True):
            yield inputs, labels_of_all[self.process :: self.processes]
            self.progress(len(labels_of_all))

    def _loaded(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """The inputs of each batch. CUDA gets the next ones while it works; MPS crashes if two threads use it."""
        share, pending = slice(self.process, None, self.processes), deque()
        with ThreadPoolExecutor(1) as pool:
            for batch in batches:
                draws = torch.rand(len(batch), 5, generator=self.generator)[share] if self.generator else None
                if self.device.type != "cuda":
                    yield self.load(batch[share], draws)
                    continue
                pending.append(pool.submit(self.load, batch[share], draws))
                if len(pending) > 1:
                    yield pending.popleft().result()
            for loaded in pending:
                yield loaded.result()

    def means(self, loss: Tensor, correct: Tensor, images: int) -> tuple[float, float]:
        """The mean loss and the accuracy, from sums over all batches of this process. The processes' sums are added."""
        own = float(loss), float(correct), images
        loss, correct, images = map(sum, zip(*(gather(own) if self.processes > 1 else [own]), strict=True))
        return loss / images, correct / images


BLOCK, WINDOW = 64, 2**17  # images that stay together, and images among which they are then shuffled one by one


def shuffled(count: int, generator: torch.Generator) -> Tensor:
    """The numbers from 0 to `count` - 1 in random order: first blocks are shuffled, then the numbers in each window.

    Features that are larger than memory are then read block by block, without a seek for every row.
    """
    order = BLOCK * torch.randperm(-(-count // BLOCK), generator=generator)[:, None] + torch.arange(BLOCK)
    order = order[order < count]
    return torch.cat([window[torch.randperm(len(window), generator=generator)] for window in order.split(WINDOW)])
