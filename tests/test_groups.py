"""Which images belong together: near-duplicates in groups, mirrored, turned and cropped, and none where none are."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps
from sklearn.datasets import load_digits

import data
from engine.groups import SIZE, components, near_duplicates, thumbnail

CHANGES = {
    "mirrored": ImageOps.mirror,
    "upside down": ImageOps.flip,
    "turned by 90 degrees": lambda image: image.transpose(Image.Transpose.ROTATE_90),
    "turned by 180 degrees": lambda image: image.transpose(Image.Transpose.ROTATE_180),
    "grey": lambda image: image.convert("L").convert("RGB"),
    "brightened": lambda image: ImageEnhance.Brightness(image).enhance(1.4),
    "cropped": lambda image: image.crop((9, 9, 87, 87)).resize((96, 96), Image.Resampling.BICUBIC),
}


def scene(seed: int) -> Image.Image:
    """Colored spots of many sizes, blurred a little, 96x96: as different from others as photographs are."""
    random = np.random.default_rng(seed)
    image = Image.new("RGB", (96, 96), tuple(random.integers(60, 160, 3)))
    for _ in range(60):
        x, y, r = *random.integers(0, 96, 2), random.integers(2, 30)
        ImageDraw.Draw(image).ellipse((x - r, y - r, x + r, y + r), fill=tuple(random.integers(0, 180, 3)))
    return image.filter(ImageFilter.GaussianBlur(1))


def thumbnails(images: list[Image.Image]) -> torch.Tensor:
    return torch.stack([thumbnail(torch.from_numpy(np.array(image)).permute(2, 0, 1)) for image in images])


def noisy(image: Image.Image, seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).normal(0, 4, (96, 96, 3))
    return Image.fromarray((np.array(image) + noise).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("size", [2, 7, 12, 40])
def test_groups_of_any_size_are_found(size):
    images = [noisy(scene(i // size), i) for i in range(240)]
    pairs, _ = near_duplicates(thumbnails(images))
    truth = torch.arange(240) // size
    assert all(truth[i] == truth[j] for i, j, _ in pairs)
    assert len(pairs) > 0.95 * (240 - 240 / size)  # a tree for each group
    assert components(240, pairs).bincount().max() == size


@pytest.mark.parametrize("change", CHANGES)
def test_changed_copies_are_found(change):
    images = [scene(i) for i in range(100)]
    pairs, _ = near_duplicates(thumbnails(images + [CHANGES[change](image) for image in images[:40]]))
    assert all(j == i + 100 for i, j, _ in pairs) and len(pairs) >= 36


def test_frames_of_a_film_are_one_group():
    """Each frame a little farther: the first and the last one have little in common."""
    films = [np.array(scene(i).resize((192, 192))) for i in range(6)]
    frames = [noisy(Image.fromarray(film[k : k + 96, k : k + 96]), k) for film in films for k in range(40)]
    pairs, _ = near_duplicates(thumbnails(frames))
    groups = components(240, pairs).view(6, 40)
    assert (groups == groups[:, :1]).float().mean() > 0.9 and len(groups.unique()) >= 6


def test_images_that_look_alike_are_not_near_duplicates():
    digits = [Image.fromarray(np.uint8(15 * image)).convert("RGB") for image in load_digits().images]
    drawings = [Image.fromarray(image) for part in data.load_data("demo").parts.values() for image in part.items]
    for images, share in ((digits, 0.05), (drawings, 0.8)):
        pairs, alike = near_duplicates(thumbnails(images))
        assert len({i for i, j, _ in pairs} | {j for i, j, _ in pairs}) < 0.02 * len(images)
        assert len(alike) > share * len(images)  # which the report says
        pairs, _ = near_duplicates(thumbnails(images + images[:20]))
        assert {(i, i + len(images)) for i in range(20)} <= {(i, j) for i, j, _ in pairs}


def test_near_duplicates_of_few_and_of_plain_images():
    assert near_duplicates(torch.zeros(0, 3, SIZE, SIZE, dtype=torch.uint8)) == ([], [])
    assert near_duplicates(thumbnails([scene(0)])) == ([], [])
    for count in (2, 3, 5):
        assert near_duplicates(thumbnails([scene(i) for i in range(count)])) == ([], [])
        assert len(near_duplicates(thumbnails([scene(0)] * count))[0]) == count - 1
    plain = [Image.new("RGB", (40, 30), color) for color in ("red", "blue", "white", "white")]
    assert near_duplicates(thumbnails(plain + [scene(i) for i in range(9)])) == ([], [])  # nothing to compare


def test_images_that_differ_in_color_alone_are_not_near_duplicates():
    shape = np.array(scene(0).convert("L"))[:, :, None]
    red, blue = (Image.fromarray(np.uint8(shape * color)) for color in ((1, 0.1, 0.1), (0.1, 0.1, 1)))
    pairs, _ = near_duplicates(thumbnails([red, blue, red, scene(1)]))
    assert [pair[:2] for pair in pairs] == [(0, 2)]


def test_components():
    assert components(5, [(3, 1, 1.0), (1, 4, 1.0)]).tolist() in ([0, 1, 2, 1, 1], [0, 2, 1, 2, 2])
    chain = [(i, i + 1, 1.0) for i in range(49_999)]
    assert components(50_000, chain).max() == components(50_000, chain[::-1]).max() == 0
    assert components(0, []).tolist() == []
