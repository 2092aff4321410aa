#!/bin/sh
# Pillow raises on the first load() of a damaged image, and not on the second: the same object is then a black picture.
#
# Whoever suppresses one exception, or passes the same Image object to a second call, gets pixels that nobody decoded.
# ImageOps.exif_transpose calls load(), so that suppressing its errors (damaged EXIF is common) hides a decoder's error.
# Seen with Pillow 13.0.0, eight zeroed bytes in the middle: "PNG: first load: OSError: broken PNG file ...; second load: no
# error, 50% of the values are 0, none was written", and the same of a JPEG 2000 file cut in half, with 100%.
# Why it matters here: engine/images.py loads before it suppresses anything, and remembers the error of an image object.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check pillow==13.0.0 numpy==2.4.6
"$dir/venv/bin/python" - <<'PY'
import io

import numpy as np
from PIL import Image

rgb = np.random.default_rng(0).integers(100, 256, (64, 96, 3), dtype=np.uint8)
for kind in ("PNG", "JPEG2000"):
    file = io.BytesIO()
    Image.fromarray(rgb).save(file, kind)
    content = file.getvalue()
    half = len(content) // 2
    image = Image.open(io.BytesIO(content[:half] + (bytes(8) + content[half + 8 :] if kind == "PNG" else b"")))
    try:
        image.load()
        raise SystemExit("this has changed: the first load raised nothing")
    except OSError as error:
        first = f"{type(error).__name__}: {error}"
    image.load()
    black = (np.array(image) == 0).mean()
    print(f"{kind}: first load: {first}; second load: no error, {black:.0%} of the values are 0, none was written")
    assert black > 0.2, "this has changed"
PY
