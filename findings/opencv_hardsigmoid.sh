#!/usr/bin/env bash
# OpenCV's dnn computes a squeeze-and-excitation block with a hard sigmoid wrongly, without a word.
#
# opencv-python-headless 5.0.0.93, onnx 1.23.2, onnxruntime 1.32.0: for Mul(HardSigmoid(Conv(ReduceMean(x))), x) of an x
# (1, 4, 6, 6), cv2.dnn returns an array (1, 4, 1, 1); ONNX Runtime and the ONNX standard say (1, 4, 6, 6). With Sigmoid
# in its place both agree, and with another alpha than 1/6: Mul and HardSigmoid seem to be taken for the activation
# HardSwish, although the other factor is not the input of HardSigmoid but another, larger tensor.
#
# MobileNetV3 is made of such blocks: cv2.dnn reads an exported MobileNetV3-Large without complaint, and its
# probabilities were off by 0.29; MobileNetV2 and EfficientNet-B0 agree to 6e-7. The README says so.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q opencv-python-headless==5.0.0.93 onnx==1.23.2 onnxruntime==1.32.0
"$folder/venv/bin/python" - <<'END'
import cv2
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

x = np.random.default_rng(0).normal(size=(1, 4, 6, 6)).astype(np.float32)
constants = {"axes": np.array([2, 3]), "weights": np.random.default_rng(1).normal(size=(4, 4, 1, 1)).astype(np.float32)}


def shapes(gate: str) -> tuple:
    """The shapes of the two outputs."""
    nodes = [
        helper.make_node("ReduceMean", ["x", "axes"], ["mean"], keepdims=1),
        helper.make_node("Conv", ["mean", "weights"], ["conv"]),
        helper.make_node(gate, ["conv"], ["gate"], **({"alpha": 1 / 6, "beta": 0.5} if gate == "HardSigmoid" else {})),
        helper.make_node("Mul", ["gate", "x"], ["y"]),
    ]
    ends = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4, 6, 6])] for name in "xy"]
    stored = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "block", *ends, stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    content = model.SerializeToString()
    right = onnxruntime.InferenceSession(content).run(None, {"x": x})[0]
    network = cv2.dnn.readNetFromONNX(np.frombuffer(content, np.uint8))
    network.setInput(x)
    found = network.forward()
    if found.shape == right.shape:
        assert np.abs(found - right).max() < 1e-5
    print(f"{gate}: ONNX Runtime {right.shape}, OpenCV {cv2.__version__} {found.shape}")
    return right.shape, found.shape


assert shapes("Sigmoid") == ((1, 4, 6, 6), (1, 4, 6, 6))
assert shapes("HardSigmoid") == ((1, 4, 6, 6), (1, 4, 1, 1)), "OpenCV has changed"
END
