#!/bin/sh
# Finders of near-duplicates take all 16-bit grey images without very dark pixels for one, and say nothing of it.
#
# imagehash, CleanVision, imagededup and difPy turn an image into 8 bits by Pillow's convert("L") or convert("RGB").
# From 16 bits, Pillow does not scale but clips at 255: whatever is brighter than that, of 65,535, becomes white, and
# only what is darker tells images apart. Files of a camera with a black level of some hundreds are all equal, and
# difPy offers to delete all but one. The same pictures in 8 bits are all different.
# Seen with imagehash 4.3.2, cleanvision 0.3.7, difPy 4.2.1, Pillow 13.0.0 (and imagededup 0.3.3.post2, which is not
# run here, because it needs torch); six different pictures, pairs of duplicates of 15: "16 bits: phash 15, dhash 15,
# average_hash 15, whash 15; CleanVision: 6 of 6 are near-duplicates; difPy: 5 of 6 are duplicates".
# Why it matters here: the split keeps near-duplicates on one side, and microscopy and machine vision make such files.
# engine/groups.py compares thumbnails of scaled values. Who first cleans a data set with one of these may lose it.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check imagehash==4.3.2 cleanvision==0.3.7 difPy==4.2.1 \
    pillow==13.0.0 numpy==2.4.6
cd "$dir"
cat >find.py <<'PY'
import contextlib
import io
import os

import difPy
import imagehash
import numpy as np
from cleanvision import Imagelab
from PIL import Image

HASHES = ("phash", "dhash", "average_hash", "whash")
rows, columns = np.mgrid[:200, :200] / 30


def picture(seed):
    """Smooth waves, from 0 to 1."""
    random = np.random.default_rng(seed)
    waves = sum(np.cos(rows * a + columns * b + c) for a, b, c in random.uniform(0, 3, (8, 3)))
    return (waves - waves.min()) / (waves.max() - waves.min())


def quiet(function):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return function()


def clean_vision(folder):
    lab = Imagelab(data_path=folder)
    lab.find_issues({"near_duplicates": {}, "exact_duplicates": {}})
    return int(lab.issues[["is_near_duplicates_issue", "is_exact_duplicates_issue"]].any(axis=1).sum())


def dif_py(folder):
    return difPy.search(difPy.build(folder)).stats["process"]["search"]["matches_found"]["duplicates"]


if __name__ == "__main__":
    seen = {}
    for folder, low, high, kind in (("8 bits", 0, 255, "uint8"), ("16 bits", 300, 60000, "uint16")):
        os.mkdir(folder)
        for seed in range(6):
            Image.fromarray((low + (high - low) * picture(seed)).astype(kind)).save(f"{folder}/{seed}.png")
        images = [Image.open(f"{folder}/{seed}.png") for seed in range(6)]
        pairs = []
        for name in HASHES:
            found = [str(getattr(imagehash, name)(image)) for image in images]
            pairs.append(sum(found[i] == found[j] for i in range(6) for j in range(i)))
        near, same = quiet(lambda: clean_vision(folder)), quiet(lambda: dif_py(folder))
        words = ", ".join(f"{name} {count}" for name, count in zip(HASHES, pairs))
        print(f"{folder}: {words}; CleanVision: {near} of 6 are near-duplicates; difPy: {same} of 6 are duplicates")
        seen[folder] = [*pairs, near, same]
    assert seen == {"8 bits": [0] * 6, "16 bits": [15, 15, 15, 15, 6, 5]}, "this has changed"
PY
venv/bin/python -W ignore find.py 2>errors.txt || { cat errors.txt; exit 1; }
