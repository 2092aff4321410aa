#!/bin/sh
# Five libraries read one JPEG 2000 file of signed values in five ways, and say nothing of what they did to them.
#
# JPEG 2000 stores in its header whether values are signed, as elevations or CT numbers are. Of the int8 values -100,
# -1, 0, 1, 100, imagecodecs returns what was written. Pillow adds 128, which keeps the order. GDAL (rasterio) makes
# all negative values 0; it reads int16 right. SimpleITK takes the bits for unsigned ones: the darkest become the
# brightest. OpenImageIO adds 8 (128 to 16 bits) and wraps: negative values are brighter than positive ones, too. cv2
# refuses the file.
# Seen with imagecodecs 2026.3.6, Pillow 13.0.0, rasterio 1.4.4 (GDAL 3.10.3), SimpleITK 2.5.7, OpenImageIO 3.2.2.0:
# "int8: ..., Pillow 28 127 128 129 228, GDAL 0 0 0 1 100, SimpleITK 156 255 0 1 100, OpenImageIO 164 7 8 9 108".
# Why it matters here: engine/readers.py reads such files with Pillow, and with imagecodecs what Pillow keeps 8 bits
# of; it moves both up by half the range. Features of one file that was read in two of these ways have little in
# common.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check imagecodecs==2026.3.6 pillow==13.0.0 rasterio==1.4.4 \
    simpleitk==2.5.7 openimageio==3.2.2.0 numpy==2.4.6
cd "$dir"
venv/bin/python -W ignore - 2>errors.txt <<'PY' || { cat errors.txt; exit 1; }
import imagecodecs
import numpy as np
import OpenImageIO
import rasterio
import SimpleITK
from PIL import Image


def open_image_io(name):
    file = OpenImageIO.ImageInput.open(name)
    return file.read_image(file.spec().format)


readers = {
    "imagecodecs": imagecodecs.imread,
    "Pillow": Image.open,
    "GDAL": lambda name: rasterio.open(name).read(1),
    "SimpleITK": lambda name: SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(name)),
    "OpenImageIO": open_image_io,
}
expected = {
    "int8": [
        [-100, -1, 0, 1, 100],
        [28, 127, 128, 129, 228],
        [0, 0, 0, 1, 100],
        [156, 255, 0, 1, 100],
        [164, 7, 8, 9, 108],
    ],
    "int16": [
        [-10000, -100, 0, 100, 10000],
        [22768, 32668, 32768, 32868, 42768],
        [-10000, -100, 0, 100, 10000],
        [55536, 65436, 0, 100, 10000],
        [55664, 28, 128, 228, 10128],
    ],
}
for kind, lists in expected.items():
    written = np.array(lists[0], dtype=kind)
    columns = np.repeat(np.repeat(written[None], 32, axis=0), 8, axis=1)  # five columns, each of 8x32 pixels
    with open("signed.jp2", "wb") as file:
        file.write(imagecodecs.jpeg2k_encode(columns, reversible=True))
    seen = [np.asarray(read("signed.jp2")).reshape(32, 40)[0, ::8].tolist() for read in readers.values()]
    print(f"{kind}:", ", ".join(f"{name} {' '.join(map(str, row))}" for name, row in zip(readers, seen)))
    assert seen == lists, f"this has changed: {seen}"
PY
