"""How files become pixels, and pixels batches."""

import subprocess

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import draw
from PIL import Image, ImageCms
from torchvision.transforms import v2

from engine.folders import find_images
from engine.images import ImageError, augment, preprocess, read_image

NORMAL = {"image_size": 64, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "interpolation": "bilinear"}
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def pixel(path) -> list[int]:
    return read_image(path).float().mean(dim=(1, 2)).round().int().tolist()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (10, 16, 3), dtype=np.uint8))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transposition that a viewer's own one takes back
    stored = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "image.png", exif=exif)
    assert torch.equal(
        read_image(tmp_path / "image.png", crop=False), torch.from_numpy(np.array(upright)).permute(2, 0, 1)
    )


def test_every_mode_becomes_rgb(tmp_path):
    half = Image.new("L", (8, 8), 128)
    half.save(tmp_path / "grey.png")
    half.convert("1").save(tmp_path / "one_bit.png")
    Image.fromarray(np.full((8, 8), 128 * 257, np.uint16)).save(tmp_path / "16_bit.png")
    Image.new("RGB", (8, 8), (200, 100, 50)).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    Image.new("RGB", (8, 8), (200, 100, 50)).quantize().save(tmp_path / "palette.gif")
    Image.new("RGBA", (8, 8), (200, 100, 50, 0)).save(tmp_path / "transparent.png")
    Image.new("LA", (8, 8), (0, 0)).save(tmp_path / "grey_transparent.png")
    Image.new("P", (8, 8), 0).save(tmp_path / "palette_transparent.png", transparency=0)
    assert pixel(tmp_path / "grey.png") == [128] * 3
    assert pixel(tmp_path / "16_bit.png") == [128] * 3
    assert np.allclose(pixel(tmp_path / "cmyk.jpg"), [200, 100, 50], atol=6)
    assert np.allclose(pixel(tmp_path / "palette.gif"), [200, 100, 50], atol=1)
    for name in ("transparent", "grey_transparent", "palette_transparent"):
        assert pixel(tmp_path / f"{name}.png") == [255] * 3
    assert read_image(tmp_path / "one_bit.png").shape == (3, 8, 8)


def test_icc_profiles_are_converted_and_damaged_ones_ignored(tmp_path):
    swapped = bytearray(SRGB)  # red and blue change places
    tags = {bytes(SRGB[at : at + 4]): at for at in range(132, 132 + 12 * int.from_bytes(SRGB[128:132], "big"), 12)}
    for tag, other in ((b"rXYZ", b"bXYZ"), (b"bXYZ", b"rXYZ")):
        swapped[tags[tag] + 4 : tags[tag] + 12] = SRGB[tags[other] + 4 : tags[other] + 12]
    for name, profile in (("srgb", SRGB), ("swapped", bytes(swapped)), ("damaged", SRGB[:200])):
        for mode in ("RGB", "RGBA", "L"):
            image = Image.new("RGB", (8, 8), (200, 100, 50)).convert(mode)
            image.save(tmp_path / f"{name}_{mode}.png", icc_profile=profile)
    for name, expected in (("srgb", [200, 100, 50]), ("swapped", [50, 100, 200]), ("damaged", [200, 100, 50])):
        for mode in ("RGB", "RGBA"):
            assert np.allclose(pixel(tmp_path / f"{name}_{mode}.png"), expected, atol=1)
        assert pixel(tmp_path / f"{name}_L.png") == [124] * 3  # a profile of another kind of image


def test_damaged_exif_is_ignored(tmp_path):
    image = Image.new("RGB", (8, 8), (100, 50, 25))
    image.save(tmp_path / "x.png", exif=b"Exif\0\0II*\0" + bytes(range(1, 60)))
    image.save(tmp_path / "x.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff", quality=100)
    assert np.allclose([pixel(tmp_path / name) for name in ("x.png", "x.jpg")], [100, 50, 25], atol=3)


def test_images_that_need_too_much_memory_are_refused(tmp_path):
    Image.new("L", (12000, 12000), 90).save(tmp_path / "baseline.jpg")  # decoded at an eighth
    Image.new("RGB", (6000, 5000), (90, 90, 90)).save(tmp_path / "30_megapixels.png", compress_level=1)
    Image.new("L", (9000, 9000), 90).save(tmp_path / "progressive.jpg", progressive=True)
    Image.new("1", (10000, 10000)).save(tmp_path / "bomb.png")
    Image.new("L", (5000, 4000), 90).save(tmp_path / "20_megapixels.jp2")
    for name in ("baseline.jpg", "30_megapixels.png"):
        assert pixel(tmp_path / name) == [90] * 3
    for name in ("progressive.jpg", "bomb.png", "20_megapixels.jp2"):
        with pytest.raises(ImageError, match="MB of memory"):
            read_image(tmp_path / name)


def test_preprocess_resizes_and_normalises_as_torchvision_does(tmp_path):
    draw(tmp_path / "small.png", (90, 120, 30), seed=0, size=(24, 18))
    draw(tmp_path / "large.png", (90, 120, 30), seed=1, size=(300, 150))
    torchvisions = v2.Compose([
        v2.Resize((64, 64)), v2.ToDtype(torch.float32, scale=True), v2.Normalize(NORMAL["mean"], NORMAL["std"])
    ])  # fmt: skip
    for crop in (False, True):
        names = ("small", "large")
        images = [read_image(tmp_path / f"{name}.png", 64, crop) for name in names]
        ours = preprocess(images, NORMAL)
        whole = [read_image(tmp_path / f"{name}.png", 1000, crop=False) for name in names]
        expected = [v2.functional.center_crop(image, min(image.shape[1:])) if crop else image for image in whole]
        difference = ours - torch.stack([torchvisions(image) for image in expected])
        assert difference.abs().max() < 1.6 / 255 / 0.22  # they round to uint8 in between, and Pillow twice
        bf16 = preprocess(images, NORMAL, "cpu", torch.bfloat16)
        assert bf16.dtype == torch.bfloat16 and (bf16 - ours).abs().max() < 0.02


def test_augment_shifts_mirrors_and_blanks_a_square():
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    mean = torch.tensor([124, 116, 104], dtype=torch.uint8)[:, None, None]  # that of NORMAL, times 255
    still = augment(image, torch.tensor([0.5, 0.5, 0.9, 0.25, 0.75]), NORMAL["mean"])
    expected = image.clone()
    expected[:, 8:24, 40:56] = mean
    assert still.equal(expected)
    moved = augment(image, torch.tensor([0.999, 0.5, 0.1, 0.0, 0.0]), NORMAL["mean"])
    expected = F.pad(image.float(), (0, 0, 0, 8), mode="reflect")[:, 8:].flip(2).byte()
    expected[:, :8, :8] = mean
    assert moved.equal(expected)
    assert preprocess([still], NORMAL)[0, :, 8:24, 40:56].abs().max() < 0.01


def test_no_image_starts_a_program(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "check_call", lambda *args, **kwargs: pytest.fail("a program was started"))
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    for name in ("x.jpg", "x.eps"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ImageError, match="not an image"):
            read_image(tmp_path / name)
    images, skipped = find_images(tmp_path)
    assert [path.name for path in images] == ["x.jpg"] and skipped == {".eps": 1}
