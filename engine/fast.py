"""How does a network become faster without changing its outputs? The fast copy, the training copy, a faster import.

Private interfaces of torch are used here only. Wherever they fail, the plain modules take over.
"""

import copy
import importlib
import math
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from types import ModuleType
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from engine.device import CPU_BATCH, DTYPES, full_precision, layout_for, pick_precision, threads
from engine.layers import averages, run_layers

# The largest output of a convolution, in elements, to compute at a time. Larger ones leave the cache of a core.
LARGEST_MAP = 6_500_000

# oneDNN's names of activations, and their arguments
ACTIVATIONS = {
    nn.ReLU: ("relu", []),
    nn.ReLU6: ("hardtanh", [0.0, 6.0]),
    nn.Hardswish: ("hardswish", []),
    nn.SiLU: ("swish", []),
}


def fast_copy(model: nn.Module, device: torch.device, precision: str | None = None, packed: bool = True) -> nn.Module:
    """A faster copy of a TransferModel with the same outputs up to rounding, for run_images.

    `features` run in `precision` (default: the model's precision), the classifier in fp32. BatchNorm is folded into the
    convolutions, the layout is `layout_for`, and on a CPU convolutions become PackedConv, unless `packed` is False.
    Each change is left out if it fails or gives other outputs with this version of torch on this processor.
    """
    precision = precision or model.precision
    packed = packed and device.type == "cpu" and torch.backends.mkldnn.is_available()
    # inference mode hides changes of a tensor; TF32 may round more than the tolerance allows
    with torch.inference_mode(False), torch.no_grad(), threads(1), full_precision():
        fast = copy.deepcopy(model).eval().requires_grad_(False).to(device)
        images = torch.randn(fast.example().shape, generator=torch.Generator().manual_seed(0)).to(device)
        fast = _changed(fast, fold_norms, images, tolerance=1e-3)
        set_layout(fast.features.to(dtype=DTYPES[precision]), layout_for(device, DTYPES[precision]))
        if packed and precision in ("fp32", pick_precision("auto", device)):
            tolerance = 1e-3 if precision == "fp32" else 0.1  # bf16 rounds much
            fast = _changed(fast, pack_convolutions, images.to(DTYPES[precision]), tolerance)
    return fast


def _changed(
    model: nn.Module, change: Callable[[nn.Module, Tensor], None], images: Tensor, tolerance: float
) -> nn.Module:
    """A copy of the model after the change, or the model if that fails or gives other features."""
    with suppress(Exception):  # an operator is missing, or does not support this shape or this processor
        change(changed := copy.deepcopy(model), images)
        features = model.forward_view(images)
        if (changed.forward_view(images) - features).abs().max() < tolerance * features.abs().max():
            return changed
    return model


def set_layout(module: nn.Module, layout: torch.memory_format) -> None:
    """Changes the memory format of the weights of convolutions. Module.to() fails for networks with 5-D buffers."""
    for tensor in module.parameters():
        if tensor.dim() == 4:
            tensor.data = tensor.data.to(memory_format=layout)


def fold_norms(model: nn.Module, images: Tensor) -> None:
    """Puts the scale and shift of each BatchNorm into the convolution before it."""
    for conv, norm in _pairs(model, images, nn.Conv2d, nn.BatchNorm2d):
        model.set_submodule(conv, fuse_conv_bn_eval(model.get_submodule(conv), model.get_submodule(norm)))
        model.set_submodule(norm, nn.Identity())


def pack_convolutions(model: nn.Module, images: Tensor) -> None:
    """Replaces convolutions, the activations after them, and global averages by faster modules."""
    activations = {}
    for conv, activation in _pairs(model, images, nn.Conv2d, *ACTIVATIONS):
        activations[conv] = ACTIVATIONS[type(model.get_submodule(activation))]
        model.set_submodule(activation, nn.Identity())
    for name, module in list(model.named_modules()):
        if type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str):
            model.set_submodule(name, PackedConv(module, *activations.get(name, ("none", []))))
        elif isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1)):
            model.set_submodule(name, GlobalAverage())
    if isinstance(model.features, nn.Sequential):
        model.features = MicroBatches(model.features, model.levels, images)


def _pairs(model: nn.Module, images: Tensor, first: type, *second: type) -> list[tuple[str, str]]:
    """The names of modules of which the second reads the unchanged output of the first. Each is called once."""
    calls, outputs, pairs, hooks = Counter(), {}, [], []

    def before(name: str, module: nn.Module, inputs: tuple) -> None:
        calls[name] += 1
        source, tensor, version = outputs.get(id(inputs[0]), (None, None, None))
        if source and type(module) in second and tensor._version == version:
            pairs.append((source, name))

    def after(name: str, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        if type(module) is first:
            outputs[id(output)] = name, output, output._version  # keeps the output, so that no other has its id

    for name, module in model.features.named_modules(prefix="features"):
        if type(module) in (first, *second):
            hooks.append(module.register_forward_pre_hook(partial(before, name)))
            hooks.append(module.register_forward_hook(partial(after, name)))
    model.forward_view(images)
    for hook in hooks:
        hook.remove()
    return [pair for pair in pairs if calls[pair[0]] == calls[pair[1]] == 1]


class PackedConv(nn.Module):
    """A convolution with its weights in oneDNN's layout, which applies an activation as it writes.

    These are the operators that torch.compile uses on a CPU, without its compiler: up to 1.7 times as fast. The best
    layout depends on the shape of the input; with any other, oneDNN copies the weights at every call.
    """

    def __init__(self, conv: nn.Conv2d, activation: str, arguments: list[float]):
        super().__init__()
        self.geometry = conv.padding, conv.stride, conv.dilation, conv.groups
        self.weight, self.bias, self.activation = conv.weight, conv.bias, (activation, arguments, "")
        self.packed = None, None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "packed": (None, None)}  # oneDNN's layout cannot be copied

    def forward(self, images: Tensor) -> Tensor:
        packed_for, weight = self.packed
        if packed_for != (layout := (images.shape, torch.get_num_threads())):
            weight = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *self.geometry, images.shape)
            self.packed = layout, weight
        return torch.ops.mkldnn._convolution_pointwise(images, weight, self.bias, *self.geometry, *self.activation)


class MicroBatches(nn.Module):
    """A sequence of layers, of which the first run on a few images at a time: a whole batch's maps leave the cache."""

    def __init__(self, layers: nn.Sequential, levels: list[int], images: Tensor):
        super().__init__()
        sizes, largest = [], []  # each output of a layer's convolutions has a size; each layer has a largest one
        convs = [module for module in layers.modules() if isinstance(module, PackedConv)]
        hooks = [conv.register_forward_hook(lambda *args: sizes.append(args[2].numel())) for conv in convs]
        for layer in layers:
            sizes[:] = [1]
            images = layer(images)
            largest.append(max(sizes))
        for hook in hooks:
            hook.remove()
        count = sum(2 * CPU_BATCH * size > LARGEST_MAP for size in largest)  # maps become smaller and smaller
        self.early, self.late, self.levels = layers[:count], layers[count:], levels
        self.size = 2 ** int(math.log2(max(1, LARGEST_MAP // max(largest))))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, width), as TransferModel.forward_view"""
        parts = [run_layers(self.early, self.levels, part) for part in images.split(self.size)]
        maps, early_levels = (torch.cat(outputs) for outputs in zip(*parts, strict=True))
        maps, late_levels = run_layers(self.late, self.levels, maps, first=len(self.early))
        return torch.cat([early_levels, late_levels, averages(maps, 1)], dim=1)


class GlobalAverage(nn.Module):
    """AdaptiveAvgPool2d(1), which takes up to six times as long in bf16 on a CPU."""

    def forward(self, images: Tensor) -> Tensor:
        return F.avg_pool2d(images, images.shape[2:])


# by model: its version, and the copy of it
_cached: WeakKeyDictionary[nn.Module, tuple[list, nn.Module]] = WeakKeyDictionary()
_making_a_copy = threading.Lock()


def cached_copy(model: nn.Module, make: Callable[[nn.Module, torch.device], nn.Module]) -> nn.Module:
    """The copy of a TransferModel that `make` makes, only if it has changed since the last call. TypeError if not fp32.

    A change shows in its plain attributes, in which tensors it has, and in how often these were changed in place.
    """
    tensors = [*model.parameters(), *model.buffers(), *model.program.values()]
    if {tensor.dtype for tensor in tensors if tensor.is_floating_point()} != {torch.float32}:
        raise TypeError("the model's weights must be float32: use model.float(), and model.precision for speed")
    version = [repr({name: value for name, value in vars(model).items() if not name.startswith("_")})]
    version += [(id(tensor), tensor.is_inference() or tensor._version) for tensor in tensors]
    with _making_a_copy:
        if model not in _cached or _cached[model][0] != version:
            _cached[model] = version, make(model, tensors[0].device)
        return _cached[model][1]


# -------------------------------------------------------------------------------------------------- fine-tuning


class InParts(nn.Module):
    """Computes features, and their gradients, for several parts of a batch at a time, each in its own thread.

    On two cores that is 1.4 times as fast as convolutions that both cores share. autograd alone would go backward
    through one part after the other.
    """

    def __init__(self, model: nn.Module, parts: int):
        super().__init__()
        self.model, self.parts, self.pool = model, parts, ThreadPoolExecutor(parts)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> logits (B, classes)"""
        features = _Parts.apply(self, torch.is_grad_enabled(), images, *self.model.features.parameters())
        return self.model.classifier(features)


class _Parts(torch.autograd.Function):
    """Images (B, 3, H, W) -> features (B, width). The gradients are sums over the parts."""

    @staticmethod
    def forward(ctx: object, network: InParts, training: bool, images: Tensor, *parameters: Tensor) -> Tensor:
        def forward_part(images: Tensor) -> Tensor:
            with torch.set_grad_enabled(training):
                return network.model.forward_features(images)

        ctx.network, ctx.parameters = network, parameters
        ctx.features = list(network.pool.map(forward_part, images.chunk(network.parts)))
        return torch.cat(ctx.features)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple:
        def backward_part(features: Tensor, gradient: Tensor) -> tuple:
            return torch.autograd.grad(features, ctx.parameters, gradient)

        parts = ctx.network.pool.map(backward_part, ctx.features, gradient.chunk(ctx.network.parts))
        return None, None, None, *map(sum, zip(*parts, strict=True))


# ------------------------------------------------------------------------------------------------------- import


@contextmanager
def without_compiler() -> Iterator[None]:
    """While torchvision is imported, a placeholder stands in for the module of torch's compiler that it asks for.

    torchvision asks for a function that nothing here calls; importing the compiler would take a third of the time in
    which inference.py answers. The placeholder imports the compiler when it is used.
    """
    name = "torch._dynamo.utils"
    placeholder = ModuleType(name)

    def compiler(attribute: str) -> object:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        if sys.modules.get(name) is placeholder:
            del sys.modules[name]
        return getattr(importlib.import_module(name), attribute)

    placeholder.__getattr__ = compiler
    placeholder.is_compile_supported = lambda device: compiler("is_compile_supported")(device)
    sys.modules.setdefault(name, placeholder)
    try:
        yield
    finally:
        if sys.modules.get(name) is placeholder:
            del sys.modules[name]
