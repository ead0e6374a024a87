import numpy as np
import pytest
from sklearn import metrics as peer

from kdtool.errors import DataProblem, TrainingProblem, UsageProblem
from kdtool.metrics import compared, fit_temperature, reliability_bins, score
from kdtool.metrics._calibration import softmax
from kdtool.registry import METRICS

NAMES = [name for name in METRICS.names() if compared(name) == "logits"]


def sample(rows=120, classes=5, seed=0, strength=1.5):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, rows)
    logits = generator.normal(size=(rows, classes))
    logits[np.arange(rows), labels] += strength
    return logits.astype(np.float32), labels


@pytest.mark.parametrize("classes", [2, 5, 9])
def test_against_scikit_learn(classes):
    logits, labels = sample(classes=classes, seed=classes)
    logits[:20] = np.round(logits[:20])  # ties
    guess, probabilities = logits.argmax(1), softmax(logits)
    areas = [peer.roc_auc_score(labels == c, probabilities[:, c]) for c in range(classes)]
    expected = {
        "accuracy": peer.accuracy_score(labels, guess),
        "macro-f1": peer.f1_score(labels, guess, average="macro"),
        "matthews": peer.matthews_corrcoef(labels, guess),
        "nll": peer.log_loss(labels, probabilities),
        "auroc": np.mean(areas),
    }
    values, _ = score(expected, logits, labels, resamples=0)
    assert values == pytest.approx(expected, rel=1e-6)


def test_names_facts_and_every_metric():
    names = NAMES
    expected = "accuracy adaptive-ece auroc brier classwise-ece ece macro-f1 matthews mce nll top5-accuracy"
    assert set(expected.split()) <= set(names)
    logits, labels = sample()
    values, errors = score(names, logits, labels)
    assert set(values) == set(names) == set(errors)
    for name in names:
        low, high = METRICS.info(name).facts["bounds"]
        assert isinstance(METRICS.info(name).facts["higher_is_better"], bool)
        assert low <= values[name] <= (np.inf if high is None else high)
        assert METRICS.get(name)(logits, labels) == values[name]


@pytest.mark.parametrize("name", NAMES)
def test_counts_are_repeated_rows(name):
    module = __import__(METRICS.info(name).module, fromlist=["weighted"])
    logits, labels = sample(rows=60, seed=3)
    rows = np.random.default_rng(1).integers(0, 60, 60)
    rows[0] = labels.argmax()  # classwise-ece counts classes up to the highest label present
    counts = np.bincount(rows, minlength=60).astype(float)[None]
    expected = module.compute(logits[rows], labels[rows])
    assert module.weighted(logits, labels, counts)[0] == pytest.approx(expected, abs=1e-12)


def test_standard_errors_are_seeded_and_sized():
    logits, labels = sample(rows=400)
    values, errors = score(["accuracy", "nll", "brier"], logits, labels)
    again = score(["accuracy", "nll", "brier"], logits, labels)[1]
    assert errors == again
    assert errors["accuracy"] == pytest.approx(np.sqrt(values["accuracy"] * (1 - values["accuracy"]) / 400))
    losses = -np.log(softmax(logits)[np.arange(400), labels])
    assert errors["nll"] == pytest.approx(losses.std() / 20, rel=0.2)
    assert score(["nll"], logits, labels, seed=1)[1] != {"nll": errors["nll"]}


def test_underscores_and_dashes_name_the_same_metric():
    logits, labels = sample()
    values, errors = score(["macro_f1", "macro-f1"], logits, labels)
    assert values["macro_f1"] == values["macro-f1"]
    assert errors["macro_f1"] == errors["macro-f1"]


def test_edge_cases():
    constant, labels = np.zeros((6, 3)), np.array([0, 0, 1, 1, 2, 2])
    values, _ = score(["accuracy", "matthews", "auroc", "nll", "top5-accuracy"], constant, labels)
    assert values == pytest.approx(
        {"accuracy": 1 / 3, "matthews": 0, "auroc": 0.5, "nll": np.log(3), "top5-accuracy": 1}
    )
    one_class, errors = score(["auroc", "macro-f1"], np.eye(3), np.zeros(3, int))
    assert np.isnan(one_class["auroc"])
    assert "auroc" not in errors
    ruled_out = np.array([[0.0, -np.inf], [-np.inf, 0.0]])
    assert score(["nll", "ece"], ruled_out, np.array([0, 1]))[0] == {"nll": 0.0, "ece": 0.0}
    assert np.isinf(score(["nll"], ruled_out, np.array([1, 1]))[0]["nll"])
    assert score(["accuracy"], np.array([[1.0, 0.0]]), np.array([0])) == ({"accuracy": 1.0}, {"accuracy": 0.0})


def test_top5_takes_the_first_of_equal_scores():
    logits, labels = np.zeros((2, 8)), np.array([4, 5])
    assert score(["top5_accuracy"], logits, labels, resamples=0)[0] == {"top5_accuracy": 0.5}


def test_reliability_bins_add_up():
    logits, labels = sample(rows=300)
    bins = reliability_bins(logits, labels, bins=15)
    assert len(bins) == 15
    assert sum(count for *_, count in bins) == 300
    gaps = sum(abs(sure - right) * count for sure, right, count in bins if count) / 300
    assert gaps == pytest.approx(METRICS.get("ece")(logits, labels))


@pytest.mark.parametrize("temperature", [0.08, 0.5, 1.0, 3.0, 15.0])
def test_temperature_is_found_again(temperature):
    generator = np.random.default_rng(4)
    logits = generator.normal(size=(4000, 6)) * 2
    odds = softmax(logits)
    labels = (odds.cumsum(1) > generator.random((4000, 1))).argmax(1)
    own = fit_temperature(logits, labels)
    assert own == pytest.approx(1.0, rel=0.1)
    assert fit_temperature(logits * temperature, labels) == pytest.approx(own * temperature, rel=1e-8)


def test_temperature_stays_in_its_bounds():
    assert fit_temperature(np.eye(3) * 100, np.arange(3)) == 0.05
    assert fit_temperature(-np.eye(3), np.arange(3)) == 20.0


@pytest.mark.parametrize(
    ("logits", "labels", "problem", "words"),
    [
        (np.zeros((0, 2)), np.zeros(0, int), DataProblem, "nothing to score"),
        (np.zeros((2, 2)), np.array([0, 2]), DataProblem, "classes 0 to 1"),
        (np.zeros((2, 2)), np.array([0, -100]), DataProblem, "class -100"),
        (np.zeros((2, 2)), np.array([0]), DataProblem, r"got \[2, 2\] and \[1\]"),
        (np.array([[0.0, np.nan]]), np.array([0]), TrainingProblem, "not finite"),
    ],
)
def test_what_cannot_be_scored_is_said(logits, labels, problem, words):
    with pytest.raises(problem, match=words):
        score(["accuracy"], logits, labels)


def test_a_typo_names_the_nearest_metric():
    with pytest.raises(UsageProblem) as caught:
        score(["acuracy"], *sample())
    assert "accuracy" in caught.value.hint


def test_a_metric_without_weights_is_resampled_row_by_row():
    from types import ModuleType

    from kdtool.metrics._standard_error import bootstrap_errors

    other, logits, labels = ModuleType("other"), *sample(rows=50)
    other.compute = lambda logits, labels: float((logits.argmax(1) == labels).mean())
    module = __import__("kdtool.metrics.accuracy", fromlist=["compute"])
    errors = bootstrap_errors({"other": other, "accuracy": module}, logits, labels)
    assert errors["other"] == pytest.approx(errors["accuracy"])
