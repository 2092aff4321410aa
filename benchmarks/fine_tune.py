"""How fast fine-tuning is: from picture files to updated weights, against a bare forward and backward pass.

    python benchmarks/fine_tune.py --image-size 128       random weights, generated 32x32 JPEG files

The bare pass has its batch ready on the device, no augmentation and no optimizer, in the same precision. The two take
turns, three times, and the median counts.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from speed import ROUNDS, draw_pictures

sys.path.insert(0, str(Path(__file__).parent.parent))

from data import Images, find_images, run_script
from main_train import FINE_TUNE_BATCH
from models import BACKBONES, TransferModel, pick_device, pick_precision
from train_utils import Batches, image_loader, synchronized_time, train_one_epoch


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
        files = list(find_images(draw_pictures(Path(scratch), args.images)))
        pictures = Images(files, torch.arange(len(files)) % 10)
        for name in args.models:
            ours, bare = measure(name, pictures, args.image_size, device, precision)
            print(f"{name:20} {ours:7.1f} images/s, bare {bare:7.1f}: {ours / bare:.2f}")
    return 0


def measure(name: str, pictures: Images, image_size: int, device: torch.device, precision: str) -> tuple[float, float]:
    """Images a second of an epoch of fine-tuning, and of the bare passes of as many."""
    model = TransferModel(name, "0123456789", image_size, pretrained=False)
    model.features.requires_grad_(True)
    model.to(device, memory_format=torch.channels_last).train()
    load = image_loader(pictures, model.preprocessing, device)
    batches = Batches(load, pictures.labels, torch.arange(len(pictures)), FINE_TUNE_BATCH, device, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-4, total_steps=(ROUNDS + 1) * len(batches))
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    images, labels = next(iter(batches))

    def fine_tuned() -> None:
        train_one_epoch(model, batches, optimizer, scheduler, autocast)

    def bare() -> None:
        for _ in range(len(batches)):
            with autocast:
                loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()

    def rate(function) -> float:
        start = synchronized_time(device)
        function()
        return len(pictures) / (synchronized_time(device) - start)

    fine_tuned()  # warms up
    ours, its = np.median([(rate(fine_tuned), rate(bare)) for _ in range(ROUNDS)], axis=0).tolist()
    return ours, its


if __name__ == "__main__":
    run_script(main)
