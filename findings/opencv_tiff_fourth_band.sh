#!/bin/sh
# OpenCV multiplies the colours of an 8-bit TIFF by its 4th band, for example by near infrared, and says nothing.
#
# It does so if the 4th band is marked as transparency (ExtraSamples 2), as GDAL marks it by default in a file of four
# 8-bit bands, and as Pillow does. libtiff's TIFFReadRGBATile, which OpenCV calls, returns premultiplied colours. Every
# flag of cv2.imread is concerned, also IMREAD_UNCHANGED; in 16 bits only those that convert to 8. The same pixels in a
# PNG, or in a TIFF that OpenCV or GDAL with photometric=RGB has written (ExtraSamples 0 or none), are left alone.
# Seen with opencv-python-headless 5.0.0.93, rasterio 1.4.4 (GDAL 3.10.3), Pillow 13.0.0; colours of 200, near infrared
# of 0, 64, 128, 192: "GDAL, 8 bits: OpenCV 0 50 100 151, unchanged 0 50 100 151, Pillow 200 200 200 200, GDAL 200 200
# 200 200".
# Why it matters here: water, which is dark in near infrared, becomes black, and a tree with much of it hardly changes.
# Whoever converts such pictures with OpenCV trains on others than engine/readers.py reads, which leaves them alone.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check opencv-python-headless==5.0.0.93 rasterio==1.4.4 \
    pillow==13.0.0 numpy==2.4.6
cd "$dir"
venv/bin/python -W ignore - 2>errors.txt <<'PY' || { cat errors.txt; exit 1; }
import cv2
import numpy as np
import rasterio
from PIL import Image

bands = np.full((64, 64, 4), 200, dtype=np.uint8)
bands[..., 3] = np.repeat([0, 64, 128, 192], 16)  # near infrared


def gdal(dtype, **options):
    with rasterio.open("x.tif", "w", driver="GTiff", width=64, height=64, count=4, dtype=dtype, **options) as file:
        file.write(np.moveaxis(bands.astype(dtype) * (257 if dtype == "uint16" else 1), -1, 0))
    return "x.tif"


def pillow(name):
    Image.fromarray(bands).save(name)
    return name


def opencv(name):
    cv2.imwrite(name, bands)
    return name


plain, darker = [200] * 4, [0, 50, 100, 151]
readers = {
    "OpenCV": cv2.imread,
    "unchanged": lambda name: cv2.imread(name, cv2.IMREAD_UNCHANGED),
    "Pillow": Image.open,
    "GDAL": lambda name: np.moveaxis(rasterio.open(name).read(), 0, -1),
}
files = {  # how they are made, and what OpenCV reads by default and unchanged
    "GDAL, 8 bits": (lambda: gdal("uint8"), darker, darker),
    "GDAL, 8 bits, photometric=RGB": (lambda: gdal("uint8", photometric="RGB"), plain, plain),
    "GDAL, 16 bits, alpha": (lambda: gdal("uint16", photometric="RGB", alpha="non-premultiplied"), darker, plain),
    "Pillow, TIFF": (lambda: pillow("y.tif"), darker, darker),
    "Pillow, PNG": (lambda: pillow("y.png"), plain, plain),
    "OpenCV, TIFF": (lambda: opencv("z.tif"), plain, plain),
}
for name, (make, *expected) in files.items():
    path, seen = make(), {}
    for reader, read in readers.items():
        array = np.asarray(read(path))
        assert (array[..., 0] == array[..., 2]).all()
        seen[reader] = (array[0, ::16, 0] // (257 if array.dtype == np.uint16 else 1)).tolist()
    print(f"{name}:", ", ".join(f"{reader} {' '.join(map(str, row))}" for reader, row in seen.items()))
    assert list(seen.values()) == [*expected, plain, plain], f"this has changed: {seen}"
PY
