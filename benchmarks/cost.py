"""What an answer of a model costs: multiply-adds, and images a second, one at a time and many.

    python benchmarks/cost.py --checkpoint runs/cifar10-images/checkpoints/mobilenet_v2.pt

Multiply-adds are those of one forward pass of one view. The images are black and of the model's size.
"""

import statistics
import time
from pathlib import Path

import numpy as np
import torch
from common import DEVICE, arguments
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from engine.console import run_script
from engine.device import batch_size_for, threads
from engine.openvino import fastest_copy
from engine.run import run_images
from models import load_checkpoint


def main() -> int:
    model = load_checkpoint(arguments(__doc__, checkpoint=Path).checkpoint)
    one, many = images_per_second(model, DEVICE)
    print(f"{model.name}: {multiply_adds(model) / 1e6:.0f} million multiply-adds, {one:.0f} / {many:.0f} images/s")
    return 0


def multiply_adds(model: nn.Module) -> int:
    with FlopCounterMode(display=False) as counter, threads(1), torch.no_grad():  # inference_mode hides operators
        model.eval().classifier(model.forward_view(model.example()))
    return counter.get_total_flops() // 2


def images_per_second(model: nn.Module, device: torch.device) -> tuple[float, float]:
    """One image at a time, and as many as take a second."""
    fast, size = fastest_copy(model, device), model.preprocessing["image_size"]
    image = np.zeros((size, size, 3), np.uint8)

    def seconds(count: int, batch_size: int) -> float:
        start = time.perf_counter()
        list(run_images([fast], [image] * count, batch_size=batch_size))
        return time.perf_counter() - start

    one = statistics.median([seconds(1, 1) for _ in range(6)][1:])  # the first one warms up
    workers = torch.get_num_threads() if device.type == "cpu" else 1
    batch_size = max(1, min(batch_size_for(device), int(1 / one)))
    count = workers * batch_size * max(1, int(1 / one / batch_size))
    seconds(workers * batch_size, batch_size)  # warms up, too
    return 1 / one, count / seconds(count, batch_size)


if __name__ == "__main__":
    run_script(main)
