"""What is wrong with the data: near-duplicates of test images, label errors?"""

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.console import count_of
from engine.groups import Pairs, Similar, components
from engine.images import Images

SOFTENING = 2.0  # a temperature: planted label errors rank a little higher if runners-up count more
IMPROBABLE = 0.5  # a label may be an error if its probability is less than this, times that of a random guess


def audit(
    parts: dict[str, Images], similar: Similar | None, logits: Tensor, classes: Sequence[str], correct: list[int]
) -> dict:
    """A report of near-duplicates and label errors as plain values, for plots/data.json.

    `parts` are the training, validation and test images, `similar` what `near_duplicates` says of all of them. `logits`
    (N, classes) of all images come from a model that was fitted without the image. `correct` says which test images the
    model has right.
    """
    labels = torch.cat([part.labels for part in parts.values()])
    described = [
        {"path": path, "part": name, "label": classes[label]}
        for name, part in parts.items()
        for path, label in zip(part.paths(), part.labels.tolist(), strict=True)
    ]
    errors = [
        {**described[i], "suggested": classes[label], "probability": probability}
        for i, label, probability in label_errors(logits, labels)
    ]
    if similar is None:
        return {"near_duplicates": None, "label_errors": errors}

    def in_training(pairs: Pairs) -> Tensor:
        """For each test image, whether pairs join it to a training or validation image (test images,)."""
        groups = components(len(labels), pairs)
        return torch.isin(groups[-len(correct) :], groups[: -len(correct)])

    pairs, alike = similar
    leaked = in_training(pairs)
    others = [right for right, known in zip(correct, leaked.tolist(), strict=True) if not known]
    return {
        "near_duplicates": [{"images": [described[i], described[j]], "correlation": c} for i, j, c in pairs],
        "label_errors": errors,
        "conflicting_labels": sum(described[i]["label"] != described[j]["label"] for i, j, _ in pairs),
        "test_images": len(correct),
        "test_images_with_near_duplicates": int(leaked.sum()),
        "test_images_with_near_neighbours": int(in_training(pairs + alike).sum()),
        "test_accuracy_without_them": sum(others) / len(others) if others else None,
    }


def summary(report: dict) -> str:
    """The report in a line."""
    errors = f"{count_of(len(report['label_errors']), 'label')} may be wrong"
    if report["near_duplicates"] is None:
        return f"too many images to look for near-duplicates; {errors}"
    leaked, conflicts = report["test_images_with_near_duplicates"], report["conflicting_labels"]
    accuracy, near = report["test_accuracy_without_them"], report["test_images_with_near_neighbours"]
    lines = [f"{count_of(leaked, 'test image')} {'has' if leaked == 1 else 'have'} near-duplicates"]
    if leaked and accuracy is not None:
        lines[0] += f" (test accuracy of {report['model']} without them: {accuracy:.2%})"
    if near > report["test_images"] / 2:
        lines += [f"most test images have a near neighbour in training ({near:,} of {report['test_images']:,})"]
        lines += ["if they show the same object, film or patient, hold out whole groups: --groups"]
    pairs = f"{count_of(conflicts, 'pair') if conflicts else 'no pair'} of near-duplicates"
    return "; ".join([*lines, f"{pairs} {'has' if conflicts < 2 else 'have'} conflicting labels", errors])


def label_errors(logits: Tensor, labels: Tensor) -> list[tuple[int, int, float]]:
    """Images whose label is improbable, with the most probable one and its probability, the clearest error first.

    The rank follows from the probability of the given label, its self-confidence (Northcutt et al. 2021, arXiv
    1911.00068).
    """
    probabilities = (logits / SOFTENING).softmax(dim=1)
    given = probabilities.gather(1, labels[:, None])[:, 0]
    best, label = probabilities.max(dim=1)
    worst = given.argsort()[: int((given < IMPROBABLE / logits.shape[1]).sum())].tolist()
    return [(i, int(label[i]), float(best[i])) for i in worst if label[i] != labels[i]]
