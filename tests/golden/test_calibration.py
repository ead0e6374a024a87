"""Calibration metrics against the published metric code."""

import numpy as np
import pytest

from kdtool.metrics import fit_temperature
from kdtool.registry import METRICS

from ._cases import Case, cases


def metric(name, logits, labels, bins):
    """A metric by its registered name; those with bins take the case's number of them."""
    compute = METRICS.get(name.replace("_", "-"))
    parameters = compute.__code__.co_varnames[: compute.__code__.co_argcount]
    return compute(logits, labels, bins=bins) if "bins" in parameters else compute(logits, labels)


@pytest.mark.parametrize("case", cases("calibration"))
def test_calibration(case: Case):
    logits, labels = (case.tensors[key].numpy() for key in ("logits", "labels"))
    outputs = case.roles("output")
    assert outputs
    for output in outputs:
        if output == "temperature_nll":
            actual = fit_temperature(logits, labels)
        elif output.endswith("_after_temperature"):
            scaled = logits / float(case.tensors["temperature_nll"])
            actual = metric(output.removesuffix("_after_temperature"), scaled, labels, case.hyper["bins"])
        else:
            actual = metric(output, logits, labels, case.hyper["bins"])
        np.testing.assert_allclose(
            actual, case.tensors[output].numpy(), **case.tolerance.of(output), err_msg=f"{case.id}.{output}"
        )


def test_fixture_walks_the_same_cases(golden):
    walked = [case.id for case, tensors, tolerance in golden("calibration") if tensors and tolerance]
    assert walked == [parameter.values[0].id for parameter in cases("calibration")]
