"""The fast copy and InParts compute what the plain model computes."""

import pytest
import torch
from conftest import (
    CPU,
    FAMILIES,
    ONE_SIZE,
    ROOT,
    SMALL_FAMILIES,
    finish,
    noise,
    random_model,
    randomize_statistics,
    start,
)
from PIL import Image

from engine.device import threads
from engine.fast import InParts, PackedConv, fast_copy
from models import BACKBONES, TransferModel, save_checkpoint

SIZES = [(name, None if name in ONE_SIZE else 97) for name in (*FAMILIES, "vgg16")]
SIZES += [(name, None) for name in BACKBONES if name != "vgg16"]


@pytest.mark.parametrize(("name", "image_size"), SIZES)
def test_the_fast_copy_has_the_same_outputs(name, image_size):
    model = random_model(name, image_size)
    model.views = 1
    images = noise(model)
    with torch.inference_mode():
        expected = model.forward_features(images)
        fast = fast_copy(model, CPU, "fp32")
        actual = fast.forward_features(images)
        one = fast.forward_features(images[:1])  # the weights' layout follows from the batch size
    assert expected.shape == (2, model.width)
    tolerance = 1e-4 * expected.abs().max()
    assert (actual - expected).abs().max() < tolerance and (one - expected[:1]).abs().max() < tolerance


@pytest.mark.parametrize("name", ["mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "resnet18"])
def test_the_fast_copy_in_bf16(name):
    model = random_model(name, 64)
    images = noise(model, 8)
    with torch.inference_mode():
        expected = model.forward_features(images)
        bf16 = fast_copy(model, CPU, "bf16").forward_features(images.bfloat16()).float()
    assert (bf16 - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("name", ["_convolution_pointwise", "_reorder_convolution_weight"])
def test_the_fast_copy_falls_back_to_plain_modules(name, monkeypatch):
    def missing(*args):
        raise RuntimeError("could not create a memory")

    def wrong(images, *args):
        return torch.zeros(1)

    model = random_model("mobilenet_v2", 32)
    expected = fast_copy(model, CPU, "fp32").forward_features(noise(model))
    for broken in (missing, wrong):
        monkeypatch.setattr(torch.ops.mkldnn, name, broken)
        actual = fast_copy(model, CPU, "fp32").forward_features(noise(model))
        assert torch.allclose(actual, expected, rtol=1e-3, atol=1e-5)


class InPlace(torch.nn.Module):
    """An activation and a norm after a convolution whose output has changed in place, or is read twice."""

    def __init__(self, twice: bool):
        super().__init__()
        self.conv, self.norm, self.twice = torch.nn.Conv2d(3, 3, 1), torch.nn.BatchNorm2d(3).eval(), twice
        self.relu = torch.nn.ReLU()

    def forward(self, images):
        maps = self.conv(images)
        if self.twice:
            return self.norm(maps) + self.relu(maps)
        maps -= images
        return self.norm(maps) + self.relu(maps)


@pytest.mark.parametrize("twice", [False, True])
def test_a_convolution_that_others_read_is_not_fused(twice):
    model = random_model("squeezenet1_1", 64)
    model.features, model.levels, model.views = torch.nn.Sequential(InPlace(twice)), [], 1
    model = randomize_statistics(model)
    images = noise(model)
    with torch.inference_mode():
        expected, fast = model.forward_view(images), fast_copy(model, CPU, "fp32")
        assert torch.allclose(fast.forward_view(images), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet18", "densenet121"])
def test_inference_mode_folds_as_well(name):
    model = random_model(name, 64)
    with torch.inference_mode():
        fast = fast_copy(model, CPU, "fp32")
    norms, convs = (
        [sum(isinstance(module, kind) for module in each.modules()) for each in (model, fast)]
        for kind in (torch.nn.BatchNorm2d, PackedConv)
    )
    assert norms[1] < 0.6 * norms[0] and convs[0] == 0
    assert convs[1] > 10 or not torch.backends.mkldnn.is_available()


@pytest.mark.parametrize("name", SMALL_FAMILIES)
def test_parts_of_a_batch_have_the_same_outputs_and_gradients(name):
    model = random_model(name, 80 if name in ("alexnet", "inception_v3") else 64)
    model.unfreeze()
    model.train()
    model.features.double()  # or rounding would move an activation across zero here and there
    images = noise(model).double()

    def gradients(network: torch.nn.Module) -> list[torch.Tensor]:
        torch.manual_seed(0)  # for dropout
        model.zero_grad()
        (logits := network(images)).logsumexp(dim=1).sum().backward()
        return [logits.detach(), *(parameter.grad for parameter in model.parameters())]

    expected, network = gradients(model), InParts(model, 2)
    with threads(1):  # for each part
        for actual, plain in zip(gradients(network), expected, strict=True):
            assert (actual - plain).abs().max() <= 1e-5 * plain.abs().max() + 1e-9
        network.eval()
        with torch.inference_mode():
            assert torch.allclose(network(images), model(images), rtol=1e-5, atol=1e-6)


def test_inference_does_not_import_the_compiler(tmp_path):
    save_checkpoint(tmp_path / "x.pt", TransferModel("mobilenet_v3_small", ("a", "b"), 64, pretrained=False), {})
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import inference\n"
        "assert inference.main(['x.png', '--checkpoint', 'x.pt']) == 0 and 'torch._dynamo' not in sys.modules\n"
        "from torchvision.ops.roi_align import is_compile_supported\n"
        "import torch._dynamo\n"
        "assert is_compile_supported('cpu') == torch._dynamo.utils.is_compile_supported('cpu')\n"
    )
    code, _, err = finish(start("-c", program, cwd=tmp_path))
    assert code == 0, err
