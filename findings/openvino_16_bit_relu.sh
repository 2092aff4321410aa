#!/usr/bin/env bash
# OpenVINO drops the rectifiers of a network that ONNX Runtime has quantised with 16-bit activations, without a word.
#
# ONNX Runtime's quantize_static removes a ReLU whose output it quantises with the zero point 0: QuantizeLinear clamps
# at zero anyway. OpenVINO reads the 8-bit network right. In the 16-bit one, its CPU plugin removes QuantizeLinear and
# DequantizeLinear together with the clamping: what it computes is the network without its ReLU. ONNX Runtime is right
# in both, with and without its own optimisations.
# Seen with openvino 2026.4.1, onnxruntime 1.32.0, onnx 1.23.2 on x86-64, fp32; Conv, ReLU, Conv of random weights,
# largest error as a share of the largest output: "8 bits: ONNX Runtime 0.02, OpenVINO 0.02; 16 bits: ONNX Runtime
# 0.02, OpenVINO 1.40; OpenVINO from the network without ReLU: 0.02".
# Why it matters here: 16 bits are what one tries when 8 cost accuracy. engine/openvino.py compares the features of a
# quantised network with those in fp32, and refuses it if they differ; reading a quantised file is not enough.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check openvino==2026.4.1 \
    onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'END'
import logging

import numpy as np
import onnx
import onnxruntime
import openvino
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

logging.disable(logging.WARNING)
random = np.random.default_rng(0)
images = random.normal(size=(8, 1, 3, 16, 16)).astype(np.float32)
shapes = {"first": (8, 3, 3, 3), "second": (4, 8, 3, 3)}
weights = [numpy_helper.from_array(random.normal(size=s).astype(np.float32), name) for name, s in shapes.items()]


def save(activation, name):
    nodes = [
        helper.make_node("Conv", ["x", "first"], ["a"]),
        helper.make_node(activation, ["a"], ["b"]),
        helper.make_node("Conv", ["b", "second"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 16, 16])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 12, 12])
    graph = helper.make_graph(nodes, "graph", [x], [y], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, name)


class Images(CalibrationDataReader):
    def __init__(self):
        self.rest = iter(images)

    def get_next(self):
        return next(({"x": image} for image in self.rest), None)


def onnx_runtime(name):
    return onnxruntime.InferenceSession(name).run(None, {"x": images[0]})[0]


def open_vino(name):
    return openvino.Core().compile_model(name, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(images[0])[0]


save("Relu", "relu.onnx")
save("Identity", "identity.onnx")
right, without = onnx_runtime("relu.onnx"), onnx_runtime("identity.onnx")
scale, seen = np.abs(right).max(), {}
for bits, kind in ((8, QuantType.QUInt8), (16, QuantType.QUInt16)):
    quantize_static("relu.onnx", "quantised.onnx", Images(), activation_type=kind)
    outputs = {"ONNX Runtime": onnx_runtime("quantised.onnx"), "OpenVINO": open_vino("quantised.onnx")}
    seen |= {(bits, name): np.abs(output - right).max() / scale for name, output in outputs.items()}
    print(f"{bits} bits:", ", ".join(f"{name} {seen[bits, name]:.2f}" for name in outputs))
rest = np.abs(outputs["OpenVINO"] - without).max() / scale
print(f"OpenVINO from the network without ReLU: {rest:.2f}")
wrong = seen.pop((16, "OpenVINO"))
assert max(*seen.values(), rest) < 0.05 and wrong > 0.5, "this has changed"
END
