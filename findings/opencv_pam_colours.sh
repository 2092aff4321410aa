#!/bin/sh
# OpenCV swaps red and blue of a PAM file in colour, but not of the same pixels in a PPM, nor when it makes them grey.
#
# PAM (P7) is Netpbm's newer format, which FFmpeg and ImageMagick write, too; its tuples of the type RGB are red, green,
# blue. If the array that is asked for has the file's shape, OpenCV copies its bytes, and never turns RGB into BGR as
# all of its other readers do; the conversion to grey takes them for RGB, rightly. It writes BGR as well, so that its
# own files look right in OpenCV only, even with IMWRITE_PAM_FORMAT_RGB.
# Seen with opencv-python-headless 5.0.0.93, netpbmfile 2026.1.29, PyAV 18.1.0 (FFmpeg); a red pixel as RGB: "PAM,
# 8 bits: OpenCV 0 0 250, grey 75, netpbmfile 250 0 0, FFmpeg 250 0 0; PPM, 8 bits: OpenCV 250 0 0".
# Why it matters here: the project refuses PAM, and its user converts the files. With OpenCV a network would be trained
# on skies of orange, and nothing would say so.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check opencv-python-headless==5.0.0.93 netpbmfile==2026.1.29 \
    av==18.1.0 numpy==2.4.6
cd "$dir"
venv/bin/python - <<'PY'
import av
import cv2
import netpbmfile
import numpy as np


def opencv(name):
    return cv2.cvtColor(cv2.imread(name), cv2.COLOR_BGR2RGB)


def ffmpeg(name):
    with av.open(name) as file:
        return next(file.decode(video=0)).to_ndarray(format="rgb24")


red, blue, grey = [250, 0, 0], [0, 0, 250], [75]
readers = {
    "OpenCV": (opencv, blue),
    "unchanged": (lambda name: cv2.imread(name, cv2.IMREAD_UNCHANGED)[..., ::-1], blue),
    "grey": (lambda name: cv2.imread(name, cv2.IMREAD_GRAYSCALE)[..., None], grey),
    "netpbmfile": (netpbmfile.imread, red),
    "FFmpeg": (ffmpeg, red),
}


def look(title, name, swapped=False):
    """`swapped`: red and blue are exchanged in the file."""
    seen = {}
    for reader, (read, expected) in readers.items():
        array = read(name)
        seen[reader] = (array[0, 0] // (257 if array.dtype.itemsize == 2 else 1)).tolist()
        if name.endswith("ppm"):
            expected = grey if reader == "grey" else red
        elif swapped:
            expected = {"OpenCV": red, "unchanged": red, "grey": [28]}.get(reader, blue)
        assert np.allclose(seen[reader], expected, atol=1), f"this has changed: {title}, {reader} {seen[reader]}"
    print(f"{title}:", ", ".join(f"{reader} {' '.join(map(str, pixel))}" for reader, pixel in seen.items()))


for bits in (8, 16):
    top = 2**bits - 1
    pixels = np.full((16, 16, 3), red, dtype=">u2") * 257 if bits == 16 else np.full((16, 16, 3), red, dtype="u1")
    content = pixels.astype(">u2" if bits == 16 else "u1").tobytes()
    with open("x.pam", "wb") as file:
        file.write(b"P7\nWIDTH 16\nHEIGHT 16\nDEPTH 3\nMAXVAL %d\nTUPLTYPE RGB\nENDHDR\n" % top + content)
    with open("x.ppm", "wb") as file:
        file.write(b"P6\n16 16\n%d\n" % top + content)
    look(f"PAM, {bits} bits", "x.pam")
    look(f"PPM, {bits} bits", "x.ppm")
options = [cv2.IMWRITE_PAM_TUPLETYPE, cv2.IMWRITE_PAM_FORMAT_RGB]
cv2.imwrite("own.pam", np.full((16, 16, 3), red[::-1], np.uint8), options)
look("PAM by OpenCV", "own.pam", swapped=True)
PY
