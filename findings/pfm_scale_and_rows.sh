#!/bin/sh
# Five libraries read one PFM file in four ways: upside down or not, and multiplied, divided or left by its scale.
#
# PFM stores one float a pixel or three, the lowest row first. The sign of the third number of its header is the order
# of bytes, the rest is a scale, such as 0.003922 in Middlebury's stereo sets. Pillow and netpbmfile ignore it, OpenCV
# and FFmpeg divide by it, OpenImageIO multiplies: values of one file differ by a factor of 65,000. OpenImageIO and
# netpbmfile return the lowest row first: OpenImageIO flips what it writes, not what it reads, not even its own files.
# Seen with Pillow 13.0.0, opencv-python-headless 5.0.0.93, PyAV 18.1.0 (FFmpeg), OpenImageIO 3.2.2.0, netpbmfile
# 2026.1.29; first and last row, of which the first is 1 at the top: "scale 0.003922: Pillow 1 3, OpenCV 255 765, FFmpeg
# 255 765, OpenImageIO 0.0118 0.00392, netpbmfile 3 1".
# Why it matters here: grey PFM (depth, disparity) is read by Pillow, and one scale of the data set makes 8 bits of it.
# Files of different scales, or converted by another of these, are darker, brighter or upside down.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check pillow==13.0.0 opencv-python-headless==5.0.0.93 \
    av==18.1.0 openimageio==3.2.2.0 netpbmfile==2026.1.29 numpy==2.4.6
cd "$dir"
venv/bin/python - <<'PY'
import av
import cv2
import netpbmfile
import numpy as np
import OpenImageIO
from PIL import Image


def ffmpeg(name):
    with av.open(name) as file:
        return next(file.decode(video=0)).to_ndarray()


readers = {
    "Pillow": Image.open,
    "OpenCV": lambda name: cv2.imread(name, cv2.IMREAD_UNCHANGED),
    "FFmpeg": ffmpeg,
    "OpenImageIO": lambda name: OpenImageIO.ImageBuf(name).get_pixels(OpenImageIO.FLOAT),
    "netpbmfile": netpbmfile.imread,
}
rows = np.repeat(np.float32([[1], [2], [3]]), 4, axis=1)  # the first is at the top
factors = {"Pillow": 0, "OpenCV": -1, "FFmpeg": -1, "OpenImageIO": 1, "netpbmfile": 0}  # powers of the scale
for scale, name in ((1, "1"), (2, "2"), (0.003922, "0.003922")):
    for sign, order in ((-1, "<"), (1, ">")):
        with open("depth.pfm", "wb") as file:
            file.write(b"Pf\n4 3\n%.6f\n" % (sign * scale) + rows[::-1].astype(order + "f4").tobytes())
        seen = {reader: np.squeeze(read("depth.pfm"))[[0, -1], 0].tolist() for reader, read in readers.items()}
        for reader, ends in seen.items():
            expected = [3, 1] if reader in ("OpenImageIO", "netpbmfile") else [1, 3]
            expected = [value * scale ** factors[reader] for value in expected]
            assert np.allclose(ends, expected, rtol=1e-3), f"this has changed: {reader} {ends}"
    print(f"scale {name}:", ", ".join(f"{reader} {first:.3g} {last:.3g}" for reader, (first, last) in seen.items()))
OpenImageIO.ImageBuf(rows).write("own.pfm")
own = {reader: np.squeeze(readers[reader]("own.pfm"))[[0, -1], 0].tolist() for reader in ("Pillow", "OpenImageIO")}
print("written by OpenImageIO:", ", ".join(f"{name} {first:.3g} {last:.3g}" for name, (first, last) in own.items()))
assert own == {"Pillow": [1, 3], "OpenImageIO": [3, 1]}, "this has changed"
PY
