"""How fast fine-tuning is, from image files to updated weights, against a bare forward and backward pass.

    python benchmarks/fine_tune.py --image-size 128       random weights, generated 32x32 JPEG files

The bare pass is of PyTorch's own modules, with all cores on one batch that is ready on the device, without augmentation
and optimizer, in the same precision. The two take turns, three times, and the median counts.
"""

import copy
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from common import DEVICE, PRECISION, arguments, draw_images
from torch import nn

from engine.batches import Batches, ImageLoader
from engine.console import run_script
from engine.device import synchronized_time, threads
from engine.folders import labelled_images
from engine.images import Images
from models import TransferModel
from train_utils import FINE_TUNING, Training, fine_tune

ROUNDS, CLASSES = 3, tuple("0123456789")


def main() -> int:
    args = arguments(__doc__, models=["mobilenet_v2", "mobilenet_v3_large"], images=1280, image_size=128)
    precision = "fp32" if DEVICE.type == "cpu" else PRECISION
    print(f"{DEVICE}, {precision}, {args.image_size} pixels, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as scratch:
        folder = draw_images(Path(scratch, "images"), args.images)
        images, _ = labelled_images(folder, CLASSES, folder)
        for name in args.models:
            ours, bare = measure(name, images, args.image_size, precision)
            print(f"{name:20} {ours:7.1f} images/s, bare {bare:7.1f}: {ours / bare:.2f}")
    return 0


def measure(name: str, images: Images, image_size: int, precision: str) -> list[float]:
    """Images a second of an epoch of fine-tuning, and of as many bare passes."""
    model = TransferModel(name, CLASSES, image_size, pretrained=False)
    model.unfreeze()
    plain, criterion = copy.deepcopy(model).to(DEVICE, memory_format=torch.channels_last).train(), nn.CrossEntropyLoss()
    autocast = torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision == "bf16")
    recipe, cores = replace(FINE_TUNING, epochs=ROUNDS + 1), torch.get_num_threads()  # the first epoch warms up
    batches = Batches(ImageLoader(images, model.preprocessing, DEVICE), images.labels, recipe.batch_size, DEVICE)
    ready, labels = next(iter(batches))
    seconds = []

    def bare_passes(training: Training) -> None:
        with threads(cores):
            start = synchronized_time(DEVICE)
            for _ in range(batches.steps):
                with autocast:
                    loss = criterion(plain(ready), labels)
                plain.zero_grad()
                loss.backward()
            seconds.append((training.history[-1]["seconds"], synchronized_time(DEVICE) - start))

    one_image = images.subset(torch.arange(1))  # validation takes no time
    fine_tune(model, images, one_image, recipe, precision, DEVICE, seed=0, after_epoch=bare_passes)
    return (len(images) / np.median(seconds[1:], axis=0)).tolist()


if __name__ == "__main__":
    run_script(main)
