"""How does a network become faster without changing its outputs? The fast copy, the training copy, a faster import.

Private interfaces of torch are used here only. Wherever they fail, the plain modules take over.
"""

import copy
import importlib
import itertools
import math
import operator
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse
from torch.fx.passes.shape_prop import ShapeProp

from engine.device import CPU_BATCH, DTYPES, GPU_BATCH, pick_precision, threads
from engine.layers import averages, run_layers, stage_ends

# The largest output of a layer, in elements, to compute at a time on a CPU. Larger ones leave the cache, and their
# memory is allocated anew at every call, which takes up to twice the time.
LAYER_ELEMENTS = 6_500_000

# oneDNN's names of activations, and their arguments
ACTIVATIONS = {
    nn.ReLU: ("relu", []),
    F.relu: ("relu", []),
    nn.ReLU6: ("hardtanh", [0.0, 6.0]),
    nn.Hardswish: ("hardswish", []),
    nn.SiLU: ("swish", []),
}


def fast_copy(model: nn.Module, device: torch.device, precision: str | None = None, packed: bool = True) -> nn.Module:
    """A faster copy of a TransferModel with the same outputs up to rounding, for run_images.

    `features` run in `precision` (default: the model's precision), the classifier in fp32.

    Each stage of `features` is traced by torch.fx, its BatchNorm folded into the convolutions, its layout
    channels_last. On a CPU, convolutions become PackedConv, and stages with large maps run on micro-batches, unless
    `packed` is False. A stage keeps its plain modules if it cannot be traced, or if the faster modules fail or give
    other outputs with this version of torch on this processor.
    """
    precision = precision or model.precision
    fast = copy.deepcopy(model).eval().requires_grad_(False).to(device)
    packed = packed and device.type == "cpu" and torch.backends.mkldnn.is_available()
    packed = packed and precision in ("fp32", pick_precision("auto", device))
    with torch.inference_mode(), threads(1):
        noise = torch.randn(fast.example().shape, generator=torch.Generator().manual_seed(0))
        images = noise.to(device, DTYPES[precision])
        if isinstance(fast.features, nn.Sequential):
            fast.features = _fast_sequence(fast.features, fast.levels, images, packed)
        else:
            fast.features, *_ = _fast_stage(fast.features, images, packed)
    return fast


def _fast_sequence(features: nn.Sequential, levels: list[int], images: Tensor, packed: bool) -> nn.Module:
    layers, ends = list(features), stage_ends(features)
    stages, largest = [], []
    for first, end in zip([0, *(end + 1 for end in ends)], ends, strict=False):
        stage, images, size = _fast_stage(nn.Sequential(*layers[first : end + 1]), images, packed)
        stages.append(stage)
        largest.append(size)
    early = max((i for i, size in enumerate(largest, 1) if packed and size * CPU_BATCH > LAYER_ELEMENTS), default=0)
    part = 2 ** max(0, int(math.log2(LAYER_ELEMENTS / max(largest)))) if early else GPU_BATCH
    return FastFeatures(stages, [i for i, end in enumerate(ends) if end in levels], early, part)


# torch.fx patches every module of the process while it traces one, so no other thread may run a model then
_passes, _running, _waiting = threading.Condition(), 0, 0


@contextmanager
def running() -> Iterator[None]:
    """Surrounds a forward pass that may take place while another thread makes a fast copy."""
    global _running
    with _passes:
        _passes.wait_for(lambda: not _waiting)
        _running += 1
    try:
        yield
    finally:
        with _passes:
            _running -= 1
            _passes.notify_all()


@contextmanager
def _tracing() -> Iterator[None]:
    global _waiting
    with _passes:
        _waiting += 1
        try:
            _passes.wait_for(lambda: not _running)
            yield
        finally:
            _waiting -= 1
            _passes.notify_all()


def _fast_stage(stage: nn.Module, images: Tensor, packed: bool) -> tuple[nn.Module, Tensor, int]:
    """The fast copy of a stage, its output for an example (1, C, H, W), and the elements of its largest layer."""
    with suppress(Exception), _tracing():  # torch.fx cannot trace every network
        stage = fuse(stage, inplace=True)  # fast_copy has made a copy already
    to_channels_last(stage.to(dtype=images.dtype))
    if not isinstance(stage, fx.GraphModule):
        return stage, (outputs := stage(images)), outputs.numel()
    outputs = ShapeProp(stage).propagate(images)
    shapes = [getattr(node.meta.get("tensor_meta"), "shape", torch.Size()) for node in stage.graph.nodes]
    if packed:
        with suppress(Exception):  # an operator is missing, or does not support this shape or this processor
            fast = _Packer(copy.deepcopy(stage)).pack()
            if (fast(images) - outputs).abs().max() < 0.1 * outputs.abs().max():  # a wrong operator is far off
                stage = fast
    return stage, outputs, max(shape.numel() for shape in shapes)


def to_channels_last(module: nn.Module) -> None:
    """Changes the memory format of the weights of convolutions. Module.to() fails for networks with 5-D buffers."""
    for tensor in module.parameters():
        if tensor.dim() == 4:
            tensor.data = tensor.data.to(memory_format=torch.channels_last)


class _Packer:
    """Replaces convolutions, the additions and activations after them, and global averages by faster modules."""

    def __init__(self, graph: fx.GraphModule):
        self.graph = graph

    def pack(self) -> fx.GraphModule:
        for node in list(self.graph.graph.nodes):
            module = self.module_of(node)
            activation = ACTIVATIONS.get(type(module) if module else node.target)
            if isinstance(module, nn.Conv2d) and module.padding_mode == "zeros":
                self.graph.set_submodule(node.target, PackedConv(module))
            elif isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1)):
                self.graph.set_submodule(node.target, GlobalAverage())
            elif isinstance(module, nn.Identity) or getattr(node.target, "__name__", "") == "stochastic_depth":
                self.replace(node, node.args[0])  # both do nothing in eval mode
            elif activation and self.can_fuse(node.args[0], activation[0]):
                self.module_of(node.args[0]).activation = activation
                self.replace(node, node.args[0])
            elif node.target in (operator.add, operator.iadd, torch.add) and not node.kwargs:
                self.fuse_addition(node)
        self.graph.recompile()
        return self.graph

    def module_of(self, node: object) -> nn.Module | None:
        is_module = isinstance(node, fx.Node) and node.op == "call_module"
        return self.graph.get_submodule(node.target) if is_module else None

    def can_fuse(self, node: object, operation: str) -> bool:
        """Whether the node is a PackedConv that can apply the operation to its output: after an addition only ReLU."""
        conv = self.module_of(node)
        free = isinstance(conv, PackedConv) and len(node.users) == 1 and conv.activation[0] == "none"
        return free and (len(node.args) == 1 or operation == "relu")

    def fuse_addition(self, node: fx.Node) -> None:
        for source, other in (node.args, node.args[::-1]):
            if self.can_fuse(source, "add"):
                with self.graph.graph.inserting_before(node):  # where both inputs are computed
                    fused = self.graph.graph.call_module(source.target, (source.args[0], other))
                self.replace(node, fused)
                self.graph.graph.erase_node(source)
                return

    def replace(self, node: fx.Node, replacement: fx.Node) -> None:
        node.replace_all_uses_with(replacement)
        self.graph.graph.erase_node(node)


class PackedConv(nn.Module):
    """A convolution with its weights in oneDNN's layout, which adds a residual and applies an activation as it writes.

    These are the operators that torch.compile uses on a CPU, without its compiler. They save trips to memory: feature
    extraction is up to 1.9 times as fast. The best layout depends on the input's shape and the number of threads; with
    any other one, oneDNN would copy the weights at every call.
    """

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.geometry = conv.padding, conv.stride, conv.dilation, conv.groups
        self.weight, self.bias, self.activation = conv.weight, conv.bias, ("none", [])
        self.packed = None, None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "packed": (None, None)}  # oneDNN's layout cannot be copied

    def forward(self, images: Tensor, residual: Tensor | None = None) -> Tensor:
        packed_for, weight = self.packed
        if packed_for != (layout := (images.shape, torch.get_num_threads())):
            weight = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *self.geometry, images.shape)
            self.packed = layout, weight
        if residual is None:
            return torch.ops.mkldnn._convolution_pointwise(
                images, weight, self.bias, *self.geometry, *self.activation, ""
            )
        after = None if self.activation[0] == "none" else self.activation[0]
        return torch.ops.mkldnn._convolution_pointwise.binary(
            images, residual, weight, self.bias, *self.geometry, "add", None, after, [], None
        )


class GlobalAverage(nn.Module):
    """AdaptiveAvgPool2d(1), which takes up to six times as long in bf16 on a CPU."""

    def forward(self, images: Tensor) -> Tensor:
        return F.avg_pool2d(images, images.shape[2:])


class FastFeatures(nn.Module):
    """The stages of a sequence and the averages of their outputs.

    The first `early` stages run on micro-batches of `part` images: their maps are so large that those of a whole batch
    would not stay in the cache.
    """

    def __init__(self, stages: list[nn.Module], levels: list[int], early: int, part: int):
        super().__init__()
        self.early, self.late = nn.ModuleList(stages[:early]), nn.ModuleList(stages[early:])
        self.levels, self.part = levels, part

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, width), as TransferModel.forward_view"""
        if not self.early:
            maps, levels = run_layers(self.late, self.levels, images)
            return torch.cat([levels, averages(maps, 1)], dim=1)
        parts = [run_layers(self.early, self.levels, part) for part in images.split(self.part)]
        maps, early_levels = (torch.cat(outputs) for outputs in zip(*parts, strict=True))
        maps, late_levels = run_layers(self.late, self.levels, maps, first=len(self.early))
        return torch.cat([early_levels, late_levels, averages(maps, 1)], dim=1)


# -------------------------------------------------------------------------------------------------- fine-tuning


def training_copy(model: nn.Module, parts: int = 1) -> nn.Module:
    """A faster model for fine-tuning: it shares the model's parameters and has the same outputs and gradients.

    BatchNorm in eval mode only scales and shifts each channel, so it goes into the weights of the convolution before
    it. On a CPU, each batch is split into `parts`, one for each group of cores.
    """
    tensors = [*model.parameters(), *model.buffers()]
    fast = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})  # a copy of everything but these
    for layers in list(fast.modules()):
        if isinstance(layers, nn.Sequential):
            for (name, conv), (after, norm) in itertools.pairwise(list(layers.named_children())):
                if type(conv) is nn.Conv2d and type(norm) is nn.BatchNorm2d:
                    setattr(layers, name, ConvNorm(conv, norm))
                    setattr(layers, after, nn.Identity())
    return InParts(fast, parts) if parts > 1 else fast


class ConvNorm(nn.Module):
    """A convolution and the BatchNorm after it, in eval mode, as one convolution."""

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d):
        super().__init__()
        self.conv, self.norm = conv, norm

    def forward(self, images: Tensor) -> Tensor:
        conv, norm = self.conv, self.norm
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        shift = norm.running_mean if conv.bias is None else norm.running_mean - conv.bias
        return conv._conv_forward(images, conv.weight * scale[:, None, None, None], norm.bias - shift * scale)


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
