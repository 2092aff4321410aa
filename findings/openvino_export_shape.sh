#!/usr/bin/env bash
# OpenVINO forgets the shape of a program of torch.export. torch.export.export(model, (image,)) fixes every dimension, but
# the network that openvino.convert_model makes of it has the input [?,3,?,?]. The CPU plugin plans for any size then: on
# an EfficientNet-B0 it kept 10 reference reorders and 16 unfused multiplications, and took up to 1.2 times as long as
# after network.reshape([1, 3, 224, 224]), which restores what was known. TorchScript's way asks for a reshape anyway,
# so that a comparison of the two blames torch.export.
# (convert_model also imports packaging, which openvino does not require.) Seen with torch 2.14.1, openvino 2026.4.1:
# "input [?,3,?,?], then [1,3,224,224]".
# It matters here because features are computed in OpenVINO where it is installed: MobileNetV2 went from 488 to 516 images
# a second, EfficientNet-B0 from 250 to 300 (two cores of an AMD EPYC with AVX-512, fp32, one image a request).
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.14.1 openvino==2026.4.1 numpy==2.4.6 packaging==26.4
"$folder/venv/bin/python" - <<'PY'
import sys

sys.modules["openvino_telemetry"] = None
import openvino
import torch
from torch import nn

layers = [nn.Conv2d(3, 16, 3, 2, 1), nn.SiLU(), nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.SiLU(), nn.Conv2d(16, 32, 1)]
model, image = nn.Sequential(*layers).eval(), torch.zeros(1, 3, 224, 224)
program = torch.export.export(model, (image,))
[given] = [node.meta["val"].shape for node in program.graph.nodes if node.name in program.graph_signature.user_inputs]
assert tuple(given) == (1, 3, 224, 224)  # torch.export knows it
network = openvino.convert_model(program)
before = str(network.input(0).partial_shape)
network.reshape([1, 3, 224, 224])
print(f"input {before}, then {network.input(0).partial_shape}")
assert before == "[?,3,?,?]", "this has changed"
PY
