"""What goes through a GPU, on fake CUDA tensors: they have a device and a shape, and no hardware."""

import pytest
import torch
from conftest import CPU
from torch._subclasses.fake_tensor import FakeTensorMode

from engine.images import preprocess
from engine.run import pinned
from models import TransferModel

SIZES = [(40, 40), (40, 40), (30, 30)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the other tests use the GPU")
@pytest.mark.parametrize("name", ["mobilenet_v2", "mobilenet_v3_large", "resnet18"])
def test_nothing_stays_on_the_cpu(name, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    device = torch.device("cuda")
    images = [torch.zeros(3, *size, dtype=torch.uint8) for size in SIZES]
    with FakeTensorMode(allow_non_fake_inputs=True):
        with device:
            model = TransferModel(name, "abc", 64, pretrained=False)
        for batch in (images, pinned(images[:2], device), pinned(images, device)):
            inputs = preprocess(batch, model.preprocessing, device)
            for outputs in (inputs, model(inputs), model.answer(inputs)):
                assert outputs.device.type == "cuda" and len(outputs) == len(batch)
        assert model(inputs).shape == (3, 3) and CPU != device
