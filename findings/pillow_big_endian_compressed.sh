#!/bin/sh
# Pillow swaps the bytes of big-endian compressed TIFFs of int16, int32 and float32 once too often, and says nothing.
#
# The files are valid: tifffile writes and reads them back. Uncompressed, Pillow gives the right values, and uint16 is
# right in both. libtiff returns decompressed values in the machine's order, but Pillow unpacks them as big-endian.
# Seen with Pillow 13.0.0 and tifffile 2026.3.3 on x86-64, values 1 to 4:
# "int16 raw 1 to 4, zlib 256 to 1024; int32 raw 1 to 4, zlib 16777216 to 67108864; float32 raw 1.0 to 4.0, zlib about 0"
# Why it matters here: elevations and measurements are often such files; engine/readers.py leaves them to tifffile.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check pillow==13.0.0 tifffile==2026.3.3 numpy==2.4.6
cd "$dir"
venv/bin/python - <<'PY'
import numpy as np, tifffile
from PIL import Image

for kind in ("uint16", "int16", "int32", "float32"):
    values, seen = np.array([[1, 2], [3, 4]], kind), {}
    for name in (None, "zlib"):
        tifffile.imwrite("x.tif", values, byteorder=">", compression=name)
        assert np.array_equal(tifffile.imread("x.tif"), values)
        seen[name] = np.array(Image.open("x.tif"))
    print(kind, *(f"{name or 'raw'} {a.min()} to {a.max()}" for name, a in seen.items()))
    assert np.array_equal(seen[None], values), "this has changed"
    assert np.array_equal(seen["zlib"], values) == (kind == "uint16"), "this has changed"
PY
