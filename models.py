"""The backbones, the model that is built on them, and its checkpoints.

    model = TransferModel("mobilenet_v2", classes=("cat", "dog"))
    logits = model(images)                              # (B, 3, 224, 224) -> (B, 2)

A backbone is one row of BACKBONES. To add one, add its row.
"""

import copy
import hashlib
import io
import json
import math
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision import models

from data import CPU_BATCH, whole_or_absent


def custom_classifier(width: int, classes: int, pretrained: nn.Module) -> nn.Sequential:
    """Our own classifier: the features standardised, and one hidden layer. Weight decay spares it dropout."""
    return nn.Sequential(
        nn.BatchNorm1d(width, affine=False, momentum=None),  # running statistics are plain averages
        nn.Linear(width, 256),
        nn.ReLU(),
        nn.Linear(256, classes),
    )


def new_last_layer(width: int, classes: int, pretrained: nn.Sequential) -> nn.Sequential:
    """The backbone's pretrained classifier with only its last layer replaced."""
    *kept, last = pretrained
    return nn.Sequential(*kept, nn.Linear(last.in_features, classes))


@dataclass(frozen=True)
class Backbone:
    """A row: the name that people read, torchvision's builder and weights, the plots' name, and the classifier."""

    label: str
    build: Callable[..., nn.Module]
    weights: models.WeightsEnum  # V1: features learnt with mixup and label smoothing transfer worse (arXiv 1805.08974)
    plot: str
    classifier: Callable[[int, int, nn.Module], nn.Sequential] = custom_classifier
    # the classifier reads every block, each quarter of the picture averaged, besides the average of the last block
    # alone (the idea: Head2Toe, arXiv 2201.03529)
    every_level: bool = True


BACKBONES = {
    "vgg16": Backbone("VGG16", models.vgg16, models.VGG16_Weights.IMAGENET1K_V1, "vgg16", every_level=False),
    "mobilenet_v2": Backbone(
        "MobileNetV2", models.mobilenet_v2, models.MobileNet_V2_Weights.IMAGENET1K_V1, "mobilenet"
    ),
    "mobilenet_v3_large": Backbone(
        "MobileNetV3-Large",
        models.mobilenet_v3_large,
        models.MobileNet_V3_Large_Weights.IMAGENET1K_V1,
        "mobilenet_large",
        new_last_layer,
        every_level=False,
    ),
    "mobilenet_v3_large_levels": Backbone(
        "MobileNetV3-Large, every level",
        models.mobilenet_v3_large,
        models.MobileNet_V3_Large_Weights.IMAGENET1K_V1,
        "mobilenet_large_levels",
    ),
    "mobilenet_v3_small": Backbone(
        "MobileNetV3-Small",
        models.mobilenet_v3_small,
        models.MobileNet_V3_Small_Weights.IMAGENET1K_V1,
        "mobilenet_small",
    ),
    "efficientnet_b0": Backbone(
        "EfficientNet-B0", models.efficientnet_b0, models.EfficientNet_B0_Weights.IMAGENET1K_V1, "efficientnet_b0"
    ),
}

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def pick_device(name: str = "auto") -> torch.device:
    """CUDA, else Apple's MPS, else the CPU; or the one that is named. Raises ValueError where that one isn't there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, available in there.items() if available)
    if not there[name]:
        raise ValueError(f"no {name} device here: use --device auto, which takes what there is")
    return torch.device(name)


def pick_precision(name: str, device: torch.device) -> str:
    """The one that is named; for "auto" bf16 where the hardware computes in it, else fp32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        able = torch.cpu.get_capabilities()
        fast = device.type == "cpu" and (able.get("avx512_bf16", False) or able.get("amx_bf16", False))
    return "bf16" if fast else "fp32"


class TransferModel(nn.Module):
    """A frozen backbone, `features`, and a new `classifier` on the average of its outputs over space.

    Both keep torchvision's names: `features.*` of the state dict loads into the torchvision model it came from.
    """

    def __init__(self, name: str, classes: Sequence[str], image_size: int = 224, pretrained: bool = True):
        super().__init__()
        row = BACKBONES[name]
        backbone = row.build()
        if pretrained:
            backbone.load_state_dict(_download(name, row.weights))
        normalise = row.weights.transforms()
        self.name, self.label, self.classes = name, row.label, tuple(classes)
        self.preprocessing = {"image_size": image_size, "mean": normalise.mean, "std": normalise.std}
        self.every_level = row.every_level
        self.test_views = 1  # 2: an answer is the mean of those for the picture and for its mirror image
        self.early, self.part = 0, sys.maxsize  # that many blocks run on so many pictures at a time
        self.features = backbone.features.requires_grad_(False).eval()
        with torch.inference_mode():
            self.width = self.eval().forward_features(next(backbone.parameters()).new_zeros(1, 3, 32, 32)).shape[1]
        self.classifier = row.classifier(self.width, len(classes), backbone.classifier)

    def train(self, mode: bool = True) -> "TransferModel":
        """Frozen means frozen: BatchNorm of `features` stays in eval mode, or its statistics would drift.

        While fine-tuning, so does the classifier's.
        """
        super().train(mode)
        self.features.eval()
        if next(self.features.parameters()).requires_grad:
            for module in self.classifier:
                if isinstance(module, nn.BatchNorm1d):
                    module.eval()
        return self

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, width)"""
        maps, levels = zip(*[self._run(part, 0, self.early) for part in images.split(self.part)], strict=True)
        _, late_levels = self._run(torch.cat(maps), self.early, len(self.features))
        return torch.cat([torch.cat(levels), late_levels], dim=1)

    def _run(self, images: Tensor, first: int, end: int) -> tuple[Tensor, Tensor]:
        """What the blocks from `first` to before `end` make of the images, and its averages (B, their number)."""
        levels = [images.new_empty(len(images), 0)]
        for block in self.features[first:end]:
            images = block(images)
            last = block is self.features[-1]
            if last or self.every_level:
                levels.append(F.adaptive_avg_pool2d(images, 1 if last else 2).flatten(1))
        return images, torch.cat(levels, dim=1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> logits (B, classes)"""
        logits = self.classifier(self.forward_features(images).float())  # it stays in float32
        if self.test_views == 2 and not self.training:
            logits = (logits + self.classifier(self.forward_features(images.flip(3)).float())) / 2
        return logits

    def for_inference(self, device: torch.device, dtype: torch.dtype) -> "TransferModel":
        """A copy that computes the same in less time: BatchNorm folded into the convolutions, channels_last.

        On the CPU the convolutions are PackedConv, and early blocks, whose maps are large, take few pictures at a time.
        `features` in `dtype`; the classifier stays in float32.
        """
        fast = copy.deepcopy(self).eval().requires_grad_(False)
        for block in fast.features.modules():
            if isinstance(block, nn.Sequential) and not (self.every_level and block is fast.features):
                _fold(block)
        fast.features.to(dtype=dtype, memory_format=torch.channels_last)
        if device.type == "cpu":
            fast.early, fast.part = _early_blocks(self.features, self.preprocessing["image_size"])
            computes = dtype == torch.float32 or pick_precision("auto", device) == "bf16"
            if torch.backends.mkldnn.is_available() and computes:
                _pack(fast.features, spare_levels=self.every_level)
        return fast.to(device)


# Numbers that a layer on the CPU may write at a time. More of them leave the caches, and their memory comes from the
# system, and goes back, at every call: that takes up to twice the time.
LAYER = 6_500_000


@torch.inference_mode()
def _early_blocks(features: nn.Sequential, image_size: int) -> tuple[int, int]:
    """How many blocks should take fewer pictures than a batch, and how many: no layer is to write more than LAYER."""
    images, sizes, largest = next(features.parameters()).new_zeros(1, 3, 32, 32), [], []
    for block in features:
        sizes.clear()
        with nn.modules.module.register_module_forward_hook(lambda *call: sizes.append(call[-1].numel())):
            images = block(images)
        largest.append(max(sizes) * (image_size / 32) ** 2)
    early = max((i for i, size in enumerate(largest, 1) if size * CPU_BATCH > LAYER), default=0)
    return early, 2 ** max(0, int(math.log2(LAYER / max(largest))))  # a batch in equal parts


def _fold(block: nn.Sequential) -> None:
    """BatchNorm becomes part of the convolution before it."""
    for i, (conv, norm) in enumerate(pairwise(list(block))):
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            block[i], block[i + 1] = fuse_conv_bn_eval(conv, norm), nn.Identity()


# what oneDNN calls an activation, and its arguments
ACTIVATIONS = {
    nn.ReLU: ("relu", []),
    nn.ReLU6: ("hardtanh", [0.0, 6.0]),
    nn.Hardswish: ("hardswish", []),
    nn.SiLU: ("swish", []),
}


class PackedConv(nn.Module):
    """A convolution, its weights laid out for oneDNN, that adds a residual or applies an activation as it writes.

    These are the operators that torch.compile would use, without its compiler. On a CPU the frozen pass is up to 1.9
    times as fast: what is saved are trips to memory. Which layout is best depends on the input's shape and the number
    of threads; any other would be copied at every call.
    """

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.shape = conv.padding, conv.stride, conv.dilation, conv.groups
        self.weight, self.bias, self.activation = conv.weight, conv.bias, ("none", [])
        self.packed = None, None

    def forward(self, images: Tensor, residual: Tensor | None = None) -> Tensor:
        known, weight = self.packed
        if known != (layout := (images.shape, torch.get_num_threads())):
            weight = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *self.shape, images.shape)
            self.packed = layout, weight
        if residual is not None:
            add = "add", None, None, [], None
            return torch.ops.mkldnn._convolution_pointwise.binary(
                images, residual, weight, self.bias, *self.shape, *add
            )
        return torch.ops.mkldnn._convolution_pointwise(images, weight, self.bias, *self.shape, *self.activation, "")


class PackedResidual(nn.Module):
    """layers(images) + images, where the last layer is a PackedConv."""

    def __init__(self, layers: list[nn.Module]):
        super().__init__()
        self.layers, self.last = nn.Sequential(*layers[:-1]), layers[-1]

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.layers(images), images)


class GlobalAverage(nn.Module):
    """AdaptiveAvgPool2d(1), which in bfloat16 takes up to six times as long."""

    def forward(self, images: Tensor) -> Tensor:
        return F.avg_pool2d(images, images.shape[2:])


def _pack(block: nn.Module, spare_levels: bool = False) -> None:
    """Puts PackedConv, PackedResidual and GlobalAverage in place of what they do faster, all the way down."""
    conv = None
    for name, module in block.named_children():
        if isinstance(module, nn.Conv2d):
            conv = PackedConv(module)
            setattr(block, name, conv)
        elif conv and type(module) in ACTIVATIONS and isinstance(block, nn.Sequential) and not spare_levels:
            conv.activation, conv = ACTIVATIONS[type(module)], None
            setattr(block, name, nn.Identity())
        elif isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size == 1:
            setattr(block, name, GlobalAverage())
        elif not isinstance(module, nn.Identity):
            conv = None
            _pack(module)
            if getattr(module, "use_res_connect", False):
                layers = list(_flat(module.block if hasattr(module, "block") else module.conv))
                setattr(block, name, PackedResidual(layers))


def _flat(layers: nn.Sequential) -> Iterator[nn.Module]:
    """Its layers without the nesting."""
    for layer in layers:
        if isinstance(layer, nn.Sequential):
            yield from _flat(layer)
        elif not isinstance(layer, nn.Identity):
            yield layer


def _download(name: str, weights: models.WeightsEnum) -> dict[str, Tensor]:
    """Torchvision's weights, from its cache or the network."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    try:
        return weights.get_state_dict(progress=True, check_hash=True, map_location="cpu", weights_only=True)
    except Exception as error:  # no network, no room, no permission, or whatever a damaged file makes torch raise
        what = f"is damaged, delete {file}" if file.exists() else f"can't be downloaded, put it into {file.parent}/"
        raise OSError(
            f"{file.name}, the weights of {name}, {what} ({_first_line(error)}); --demo needs no weights, "
            "and --data FOLDER no CIFAR-10"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__


# ------------------------------------------------------------------------------------------------- checkpoints

SCHEMA = 1


def content_hash(tensors: dict[str, Tensor], about: object = None) -> str:
    """SHA-256 of names, types, shapes and bytes of tensors, and of plain values beside them."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def save_checkpoint(path: Path, model: TransferModel, metrics: dict) -> None:
    """Everything that rebuilds the model without a download: plain types and tensors only."""
    about = {
        "schema": SCHEMA,
        "name": model.name,
        "classes": list(model.classes),
        "preprocessing": model.preprocessing,
        "test_views": model.test_views,
        "metrics": metrics,
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    buffer = io.BytesIO()
    torch.save({**about, "state_dict": tensors, "sha256": content_hash(tensors, about)}, buffer)
    with whole_or_absent(path) as file:
        file.write(buffer.getbuffer())


def load_checkpoint(path: Path) -> tuple[TransferModel, dict]:
    """The model, on the CPU in eval mode, and its metrics.

    Raises OSError or ValueError, in one line, where `path` is missing, damaged, or anything but a checkpoint of ours;
    nothing in the file is executed.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}: train one with main_train.py")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.save compresses nothing: what does is a bomb
            if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                raise ValueError("it is compressed")
        about = torch.load(path, map_location="cpu", weights_only=True)
        tensors, written = about.pop("state_dict"), about.pop("sha256")
        if about["schema"] != SCHEMA:
            raise ValueError(f"its schema is {about['schema']}, this version reads {SCHEMA}")
        if content_hash(tensors, about) != written:
            raise ValueError("its contents are not what was saved")
        with torch.device("meta"):
            model = TransferModel(about["name"], about["classes"], pretrained=False)
        model.preprocessing, model.test_views = about["preprocessing"], about.get("test_views", 1)
        model.load_state_dict(tensors, assign=True)
    except Exception as error:  # whatever a hostile or damaged file makes the readers raise
        raise ValueError(f"{path} is damaged or not a checkpoint of this project ({_first_line(error)})") from error
    return model.eval(), about["metrics"]
