#!/bin/sh
# skl2onnx converts three classifiers that people put on frozen features into others, without a warning.
#
# Nearest neighbours weighted by distance become unweighted: the distances are multiplied by -1, and then clipped at
# 1e-6, so that all weights are equal (see also sklearn-onnx #1212). Of a linear discriminant analysis of two classes,
# ONNX has the softmax of -d and d, which is the logistic function of 2d, not of d: every probability is too sure
# (sklearn-onnx #1116, closed). Isotonic calibration takes the nearest step where scikit-learn interpolates.
# Seen with skl2onnx 1.20.0, scikit-learn 1.7.2, onnxruntime 1.32.0: "logistic regression: 0.0% other labels,
# probabilities up to 0.00 off; weighted neighbours: 8.3%, 0.77; LDA, two classes: 0.0%, 0.15; isotonic: 0.0%, 0.02".
# Why it matters here: these are the usual classifiers on frozen features, and ONNX is how one takes them along.
# engine/export.py compares a program's answers with the model's before it writes the file.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check skl2onnx==1.20.0 scikit-learn==1.7.2 onnxruntime==1.32.0 \
    onnx==1.20.1 numpy==2.4.6
cd "$dir"
venv/bin/python -W ignore - <<'PY'
import numpy as np
import onnxruntime
from scipy.special import logit
from sklearn.calibration import CalibratedClassifierCV
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from skl2onnx import to_onnx

onnxruntime.set_default_logger_severity(3)
random = np.random.default_rng(0)
labels = random.integers(0, 2, 1000)
features = (random.normal(size=(1000, 16)) + np.eye(2, 16)[labels]).astype(np.float32)
features[700:800] = features[:100] + 0.01 * random.normal(size=(100, 16)).astype(np.float32)  # near-duplicates
labels[700:800] = labels[:100]
seen = {}


def compare(name, model):
    """Shares of other labels, largest difference of probabilities, and both probabilities."""
    model.fit(features[:700], labels[:700])
    content = to_onnx(model, features[:1], options={id(model): {"zipmap": False}}).SerializeToString()
    session = onnxruntime.InferenceSession(content)
    found, exported = session.run(None, {session.get_inputs()[0].name: features[700:]})
    own = model.predict_proba(features[700:])
    others, error = (found != model.predict(features[700:])).mean(), np.abs(exported - own).max()
    print(f"{name}: {others:.1%} other labels, probabilities up to {error:.2f} off")
    seen[name] = error, others
    return own, exported


compare("logistic regression", LogisticRegression())
_, weighted = compare("weighted neighbours", KNeighborsClassifier(5, weights="distance"))
plain, _ = compare("unweighted neighbours", KNeighborsClassifier(5))
own, exported = compare("LDA, two classes", LinearDiscriminantAnalysis())
compare("isotonic calibration", CalibratedClassifierCV(LogisticRegression(), method="isotonic"))
rest = np.abs(weighted - plain).max()
ratio = np.median(logit(exported[:, 1].astype(float)) / logit(own[:, 1]))
print(f"in ONNX: weighted neighbours are {rest:.2f} from unweighted ones, logits of LDA {ratio:.2f} times as large")
assert seen["logistic regression"][0] < 1e-4 and seen["unweighted neighbours"][0] < 1e-4
assert seen["weighted neighbours"][0] > 0.5 and rest < 1e-4, "this has changed"
assert abs(ratio - 2) < 0.01 and seen["isotonic calibration"][0] > 0.01, "this has changed"
PY
