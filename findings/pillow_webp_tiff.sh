#!/bin/sh
# Pillow raises on the first load() of a valid TIFF in WebP compression, and not on the second: the picture is then black.
#
# tifffile, GDAL and rasterio write such files, and read them. Pillow's own libtiff lacks WebP. Whoever suppresses the first
# exception, or passes the same Image object to a second call, gets pixels that nobody decoded. ImageOps.exif_transpose calls
# load(), so that suppressing its errors (damaged EXIF is common) hides this one.
# Seen with Pillow 13.0.0, tifffile 2026.3.3: "first load: OSError: decoder error -2; second load: no error, mean 0.0".
# Why it matters here: engine/images.py loads before it suppresses anything, and remembers the error of an image object.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check pillow==13.0.0 tifffile==2026.3.3 imagecodecs==2026.3.6 numpy==2.4.6
cd "$dir"
"$dir/venv/bin/python" - <<'PY'
import numpy as np
import tifffile
from PIL import Image

rgb = np.random.default_rng(0).integers(60, 200, (64, 64, 3), dtype=np.uint8)
tifffile.imwrite("webp.tif", rgb, compression="webp", photometric="rgb")
assert abs(tifffile.imread("webp.tif").mean() - rgb.mean()) < 3  # the file is right
image = Image.open("webp.tif")
try:
    image.load()
    raise SystemExit("this has changed: the first load raised nothing")
except OSError as error:
    first = f"{type(error).__name__}: {error}"
image.load()
print(f"first load: {first}; second load: no error, mean {np.asarray(image).mean()}")
assert np.asarray(image).mean() == 0, "this has changed"
PY
