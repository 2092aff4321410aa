"""How fast fine-tuning is, from image files to updated weights, against a bare forward and backward pass.

    python benchmarks/fine_tune.py --image-size 128       random weights, generated 32x32 JPEG files

The bare pass is of PyTorch's own modules, with all cores on one batch that is ready on the device, without augmentation
and optimizer, in the same precision. The two take turns, three times, and the median counts.
"""

import argparse
import copy
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from speed import ROUNDS, draw_images
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from data import Images, find_images, run_script
from models import BACKBONES, TransferModel, pick_device, pick_precision, threads
from train_utils import FINE_TUNING, Batches, Training, fine_tune, image_loader, synchronized_time


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("mobilenet_v2", "mobilenet_v3_large")
    parser.add_argument("--models", nargs="+", choices=BACKBONES, default=names)
    parser.add_argument("--images", type=int, default=1280)
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device = pick_device(args.device)
    precision = "fp32" if device.type == "cpu" else pick_precision("auto", device)
    print(f"{device}, {precision}, {args.image_size} pixels, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as scratch:
        files = list(find_images(draw_images(Path(scratch), args.images), Counter()))
        images = Images(files, torch.arange(len(files)) % 10)
        for name in args.models:
            ours, bare = measure(name, images, args.image_size, device, precision)
            print(f"{name:20} {ours:7.1f} images/s, bare {bare:7.1f}: {ours / bare:.2f}")
    return 0


def measure(name: str, images: Images, image_size: int, device: torch.device, precision: str) -> tuple[float, float]:
    """Images a second of an epoch of fine-tuning, and of as many bare passes."""
    model = TransferModel(name, "0123456789", image_size, pretrained=False)
    model.unfreeze()
    plain, criterion = copy.deepcopy(model).to(device, memory_format=torch.channels_last).train(), nn.CrossEntropyLoss()
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    recipe, cores = replace(FINE_TUNING, epochs=ROUNDS + 1), torch.get_num_threads()  # the first epoch warms up
    batches = Batches(image_loader(images, model.preprocessing, device), images.labels, recipe.batch_size, device)
    ready, labels = next(iter(batches))
    seconds = []

    def bare_passes(training: Training) -> None:
        with threads(cores):
            start = synchronized_time(device)
            for _ in range(batches.steps):
                with autocast:
                    loss = criterion(plain(ready), labels)
                plain.zero_grad()
                loss.backward()
            seconds.append((training.history[-1]["seconds"], synchronized_time(device) - start))

    one_image = images.subset(torch.arange(1))  # validation takes no time
    fine_tune(model, images, one_image, recipe, precision, device, seed=0, after_epoch=bare_passes)
    ours, bare = (len(images) / np.median(seconds[1:], axis=0)).tolist()
    return ours, bare


if __name__ == "__main__":
    run_script(main)
