#!/bin/sh
# Pillow, OpenCV and OpenImageIO invert an 8-bit TIFF whose zero is white, but leave it a negative in 16 bits.
#
# Photometric 0, WhiteIsZero, is usual for scanned films and for X-rays. tifffile and GDAL (rasterio) return what is
# stored, in both. OpenCV even disagrees with itself about one 16-bit file: cv2.imread inverts it by default, and does
# not with IMREAD_UNCHANGED or IMREAD_ANYDEPTH. Nobody says anything.
# Seen with Pillow 13.0.0, opencv-python-headless 5.0.0.93, OpenImageIO 3.2.2.0, tifffile 2026.3.3, rasterio 1.4.4;
# the first pixel is stored as 25 of 255, or 6553 of 65535, and should be bright: "8 bits: Pillow 230, OpenCV 230,
# OpenCV unchanged 230, OpenImageIO 230, tifffile 25, GDAL 25; 16 bits: Pillow 6553, OpenCV 230 (of 255), OpenCV
# unchanged 6553, OpenImageIO 6553, tifffile 6553, GDAL 6553".
# Why it matters here: a data set of both kinds would mix positives and negatives, and whoever converts to 8 bits
# first trains on others than are read later. engine/depth.py inverts what Pillow and tifffile leave.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check pillow==13.0.0 \
    opencv-python-headless==5.0.0.93 openimageio==3.2.2.0 \
    tifffile==2026.3.3 rasterio==1.4.4 numpy==2.4.6
cd "$dir"
venv/bin/python -W ignore - <<'PY'
import cv2
import numpy as np
import OpenImageIO
import rasterio
import tifffile
from PIL import Image


def open_image_io(name):
    file = OpenImageIO.ImageInput.open(name)
    return file.read_image(file.spec().format)


readers = {
    "Pillow": Image.open,
    "OpenCV": cv2.imread,
    "OpenCV unchanged": lambda name: cv2.imread(name, cv2.IMREAD_UNCHANGED),
    "OpenImageIO": open_image_io,
    "tifffile": tifffile.imread,
    "GDAL": lambda name: rasterio.open(name).read(1),
}
expected = {8: [230, 230, 230, 230, 25, 25], 16: [6553, 230, 6553, 6553, 6553, 6553]}
for bits, firsts in expected.items():
    top = 2**bits - 1
    stored = np.full((8, 8), top * 9 // 10, dtype=f"uint{bits}")
    stored[0, 0] = top // 10
    tifffile.imwrite("film.tif", stored, photometric="miniswhite")
    seen = [int(np.asarray(read("film.tif")).ravel()[0]) for read in readers.values()]
    print(f"{bits} bits:", ", ".join(f"{name} {first}" for name, first in zip(readers, seen)))
    assert seen == firsts, f"this has changed: {seen}"
PY
