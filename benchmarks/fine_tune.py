"""How fast fine-tuning is, from image files to updated weights, against a bare forward and backward pass.

    python benchmarks/fine_tune.py --image-size 128       random weights, generated 32x32 JPEG files

The bare pass has its batch ready on the device, no augmentation and no optimizer, in the same precision. The two take
turns, three times, and the median counts.
"""

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from speed import ROUNDS, draw_images
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from data import Images, find_images, run_script
from models import BACKBONES, TransferModel, pick_device, pick_precision
from train_utils import FINE_TUNING, Batches, Training, image_loader, synchronized_time, train_one_epoch


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
    model.to(device, memory_format=torch.channels_last)
    load = image_loader(images, model.preprocessing, device)
    batches = Batches(load, images.labels, FINE_TUNING.batch_size, device, seed=0)
    training = Training(model, batches, batches, replace(FINE_TUNING, epochs=ROUNDS + 1), precision)
    criterion = nn.CrossEntropyLoss(label_smoothing=FINE_TUNING.label_smoothing)
    ready, labels = next(iter(batches))

    def fine_tuning() -> None:
        train_one_epoch(model, batches, training.optimizer, training.scheduler, criterion, training.autocast)

    def bare_passes() -> None:
        for _ in range(batches.steps):
            with training.autocast:
                loss = criterion(model(ready), labels)
            model.zero_grad()
            loss.backward()

    def rate(run: Callable[[], None]) -> float:
        start = synchronized_time(device)
        run()
        return len(images) / (synchronized_time(device) - start)

    fine_tuning()  # warms up
    ours, bare = np.median([(rate(fine_tuning), rate(bare_passes)) for _ in range(ROUNDS)], axis=0).tolist()
    return ours, bare


if __name__ == "__main__":
    run_script(main)
