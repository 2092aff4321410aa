#!/usr/bin/env bash
# OpenVINO and OpenCV ignore the antialiasing of an ONNX network's Resize, without a word.
#
# Since opset 18, Resize has the attribute antialias; torch.onnx.export writes it for F.interpolate(antialias=True).
# ONNX Runtime and ONNX's own reference heed it. OpenVINO and cv2.dnn give the very output that they give without it:
# what is made smaller keeps all its noise. (OpenVINO refuses the same operation of a program of torch.export.)
# Seen with openvino 2026.4.1, opencv-python-headless 5.0.0.93, onnxruntime 1.32.0, onnx 1.23.2; noise from 64x64 to
# 16x16, largest error of values from 0 to 1: "linear: reference 0.00, OpenVINO 0.35, OpenCV 0.35; cubic: reference
# 0.00, OpenVINO 0.50, OpenCV 0.50".
# Why it matters here: backbones were trained on antialiased images, and it is tempting to export the resizing with
# the network. engine/export.py leaves it out: an exported model takes images of its size, and its notes say how to
# make them.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check openvino==2026.4.1 opencv-python-headless==5.0.0.93 \
    onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'END'
import cv2
import numpy as np
import onnx
import onnxruntime
import openvino
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

image = np.random.default_rng(0).random((1, 3, 64, 64), dtype=np.float32)


def save(mode, antialias):
    options = {"coordinate_transformation_mode": "half_pixel", "cubic_coeff_a": -0.5}
    node = helper.make_node("Resize", ["x", "", "", "size"], ["y"], mode=mode, antialias=antialias, **options)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 64, 64])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3, 16, 16])
    size = helper.make_tensor("size", TensorProto.INT64, [4], [1, 3, 16, 16])
    graph = helper.make_graph([node], "graph", [x], [y], [size])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, "resize.onnx")


def outputs():
    network = cv2.dnn.readNetFromONNX("resize.onnx")
    network.setInput(image)
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    return {
        "ONNX Runtime": onnxruntime.InferenceSession("resize.onnx").run(None, {"x": image})[0],
        "reference": ReferenceEvaluator("resize.onnx").run(None, {"x": image})[0],
        "OpenVINO": openvino.Core().compile_model("resize.onnx", "CPU", options)(image)[0],
        "OpenCV": network.forward(),
    }


changed = False
for mode in ("linear", "cubic"):
    save(mode, 0)
    plain = outputs()
    save(mode, 1)
    smooth = outputs()
    right = smooth.pop("ONNX Runtime")
    errors = {name: np.abs(output - right).max() for name, output in smooth.items()}
    print(f"{mode}:", ", ".join(f"{name} {error:.2f}" for name, error in errors.items()))
    changed |= errors["reference"] > 1e-5 or min(errors["OpenVINO"], errors["OpenCV"]) < 0.2
    changed |= any(np.abs(smooth[name] - plain["ONNX Runtime"]).max() > 1e-5 for name in ("OpenVINO", "OpenCV"))
assert not changed, "this has changed"
END
