#!/bin/sh
# Pillow reads an uncompressed 16-bit RGB TIFF with one plane for each colour wrong, and says nothing.
#
# The file is valid: tifffile writes it for an array (3, H, W), and reads it back. With zlib compression, Pillow gives the
# right picture. Without compression, its pixels are off by dozens of the 255 levels on average: each colour's plane is
# unpacked as if the colours of a pixel lay side by side. 8-bit planes are right in both.
# Seen with Pillow 13.0.0 and tifffile 2026.3.3: "raw: mean error 100.1, zlib: mean error 0.0" (random colours).
# Why it matters here: engine/tiff.py leaves deep planes to tifffile; "Pillow opens it" does not mean "Pillow reads it".
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check pillow==13.0.0 tifffile==2026.3.3 numpy==2.4.6
cd "$dir"
venv/bin/python - <<'PY'
import numpy as np, tifffile
from PIL import Image

rgb = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
error = {}
for name in (None, "zlib"):
    tifffile.imwrite("x.tif", np.moveaxis(rgb.astype(np.uint16) * 257, -1, 0), photometric="rgb", compression=name)
    assert np.array_equal(np.moveaxis(tifffile.imread("x.tif"), 0, -1) // 257, rgb)
    error[name or "raw"] = np.abs(np.array(Image.open("x.tif")).astype(int) - rgb).mean()
print(", ".join(f"{name}: mean error {value:.1f}" for name, value in error.items()))
assert error["raw"] > 20 and error["zlib"] == 0, "this has changed"
PY
