"""What goes through a GPU, on fake tensors: they have a device, a shape and a layout, and no hardware."""

import threading

import pytest
import torch
from conftest import CPU
from torch._subclasses.fake_tensor import FakeTensorMode

from engine.batches import Batches
from engine.images import preprocess
from engine.run import pinned
from models import TransferModel

SIZES = [(40, 40), (40, 40), (30, 30)]


@pytest.fixture
def fake():
    with FakeTensorMode(allow_non_fake_inputs=True):
        try:
            torch.zeros(1).to("cuda") + torch.rand(1, device="cuda")
        except RuntimeError:
            pytest.skip("this version of torch needs a GPU for fake tensors, too")
        yield


@pytest.mark.skipif(torch.cuda.is_available(), reason="the other tests use the GPU")
@pytest.mark.parametrize("name", ["mobilenet_v2", "mobilenet_v3_large", "resnet18"])
def test_nothing_stays_on_the_cpu(name, monkeypatch, fake):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    device = torch.device("cuda")
    images = [torch.zeros(3, *size, dtype=torch.uint8) for size in SIZES]
    with device:
        model = TransferModel(name, "abc", 64, pretrained=False)
    for batch in (images, pinned(images[:2], device), pinned(images, device)):
        inputs = preprocess(batch, model.preprocessing, device)
        for outputs in (inputs, model(inputs), model.answer(inputs)):
            assert outputs.device.type == "cuda" and len(outputs) == len(batch)
    assert model(inputs).shape == (3, 3) and CPU != device


def test_only_bf16_on_cuda_is_in_channels_last(fake):
    """In fp32 it is slower there, and on MPS operators are wrong in it."""
    images, settings = torch.zeros(2, 3, 8, 8, dtype=torch.uint8), {"image_size": 16, "interpolation": "bilinear"}
    settings |= {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.2, 0.2)}
    for dtype, layout in ((torch.float32, torch.contiguous_format), (torch.bfloat16, torch.channels_last)):
        batch = preprocess(images, settings, torch.device("cuda"), dtype)
        assert batch.dtype == dtype and batch.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_batches_are_loaded_beforehand_on_cuda_only(name, monkeypatch):
    """Threads that use MPS at the same time crash."""
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *args, **settings: tensor)
    loading = []
    batches = Batches(lambda *_: loading.append(threading.get_ident()), torch.arange(20), 8, torch.device(name))
    assert [len(labels) for _, labels in batches] == [10, 10] and len(loading) == 2
    assert (set(loading) == {threading.get_ident()}) == (name == "mps")
