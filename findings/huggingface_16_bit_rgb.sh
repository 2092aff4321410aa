#!/bin/sh
# Hugging Face datasets keeps the low byte of each value of a 16-bit colour image: what it stores looks like noise.
#
# Arrays (H, W, 3) of uint16 become PNG of 8 bits by array.astype(uint8), which is modulo 256. The only hint is a
# warning that speaks of "Downcasting array dtype uint16 to uint8 to be compatible with 'Pillow'". Grey arrays of uint16
# are kept as they are (as TIFF), and a 16-bit colour PNG that is given by its path is decoded by Pillow to its high
# bytes: one picture in three forms, three pictures.
# Seen with datasets 5.2.0, Pillow 13.0.0; a ramp from 0 to 65535, correlation of what is read with what was given:
# "colour, as array: 8 bits, 0.00; colour, as file: 8 bits, 1.00; grey, as array: 16 bits, 1.00".
# Why it matters here: engine/readers.py reads all 16 bits of such files. A data set that comes from the Hub, or was
# put together with this library, may hold noise in their place, on which any backbone is at chance.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check datasets==5.2.0 pillow==13.0.0 imagecodecs==2026.3.6 \
    numpy==2.4.6
cd "$dir"
HF_HOME="$dir/home" HF_HUB_OFFLINE=1 venv/bin/python - <<'PY'
import warnings

import imagecodecs
import numpy as np
from datasets import Dataset, Features, Image

grey = np.arange(65536, dtype=np.uint16).reshape(256, 256)
colour = np.stack([grey] * 3, axis=-1)
with open("colour.png", "wb") as file:
    file.write(imagecodecs.png_encode(colour))
assert np.array_equal(imagecodecs.png_decode(open("colour.png", "rb").read()), colour)
seen = {}
for name, item in (("colour, as array", colour), ("colour, as file", "colour.png"), ("grey, as array", grey)):
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        data = Dataset.from_dict({"image": [item]}, features=Features({"image": Image()}))
    read = np.asarray(data[0]["image"])
    first = read if read.ndim == 2 else read[..., 0]
    likeness = np.corrcoef(first.ravel().astype(float), grey.ravel().astype(float))[0, 1]
    texts = [str(warning.message) for warning in warned if "asting" in str(warning.message)]
    print(f"{name}: {8 * read.itemsize} bits, {likeness:.2f}", *texts)
    seen[name] = 8 * read.itemsize, round(likeness, 2)
    if item is colour:
        assert np.array_equal(read, (colour % 256).astype(np.uint8)), "this has changed"
assert seen["colour, as file"] == (8, 1) and seen["grey, as array"] == (16, 1), "this has changed"
PY
