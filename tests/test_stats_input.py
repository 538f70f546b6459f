"""Predictions that no table of an ablation can be made from: each fault is named."""

import math

import numpy as np
import pyarrow as pa
import pytest
from simulated import sampled

from ablation import stats


def metric_table(predictions, **options):
    return stats.metric_table(sampled(predictions, **options))


def effect_table(predictions, *, reference="none", **options):
    return stats.effect_table(sampled(predictions, **options), reference=reference)


def _two_trials():
    """Arms none and a, one seed, the same six crystals."""
    p = np.linspace(0.1, 0.9, 6)
    return pa.table(
        {
            "trial": ["none-0"] * 6 + ["a-0"] * 6,
            "model": ["pointnet"] * 12,
            "strength": pa.nulls(12, pa.float64()),
            "mode": ["retrain"] * 12,
            "arm": ["none"] * 6 + ["a"] * 6,
            "seed": [0] * 12,
            "id": [f"mp-{i}" for i in range(6)] * 2,
            "group": [f"g{i}" for i in range(6)] * 2,
            "label": [0, 0, 0, 1, 1, 1] * 2,
            "p0": np.tile(1 - p, 2),
            "p1": np.tile(p, 2),
        }
    )


def _edited(predictions, column, change):
    values = predictions[column].to_pylist()
    change(values)
    index = predictions.column_names.index(column)
    return predictions.set_column(index, column, pa.array(values, predictions[column].type))


def _renamed(trial):
    return _edited(trial, "trial", lambda names: names.__setitem__(slice(None), ["x"] * len(names)))


def _set(index, value):
    return lambda values: values.__setitem__(index, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.slice(1), r"trial 'a-0' .* 0 are missing \[\], 1 are new \['mp-0'\]"),
        (lambda t: t.slice(0, 11), r"trial 'a-0' .* 1 are missing \['mp-5'\], 0 are new"),
        (lambda t: _edited(t, "id", _set(7, "x")), r"'a-0' .*missing \['mp-1'\], 1 .* \['x'\]"),
        (lambda t: _edited(t, "id", _set(7, "mp-0")), "'a-0' has 1 crystals more than once.*mp-0"),
        (lambda t: _edited(t, "label", _set(8, 1)), "'a-0' .* differ in label .*'mp-2'"),
        (lambda t: _edited(t, "group", _set(8, "g")), "'a-0' .* differ in group .*'mp-2'"),
        (
            lambda t: _edited(t, "seed", _set(0, 5)),
            "'none-0' has 2 sets of model, arm, strength, mode and seed",
        ),
        (
            lambda t: pa.concat_tables([t, _renamed(t.slice(6))]),
            "arm 'a' has another trial with seed 0",
        ),
        (lambda t: _edited(t, "p1", _set(9, math.nan)), "arm 'a', seed 0: probabilities_NC"),
        (lambda t: _edited(t, "p1", _set(9, None)), "1 rows without p1"),
        (lambda t: t.drop_columns(["p1"]), r"lack columns \['p1'\]"),
        (lambda t: t.rename_columns([*t.column_names[:-1], "p2"]), r"lack columns \['p1'\]"),
        (lambda t: t.drop_columns(["group"]), r"lack columns \['group'\]"),
        (lambda t: t.slice(0, 0), "have 0 rows"),
        (lambda t: t.set_column(8, "label", pa.array([0.0] * 12)), "label has type double"),
    ],
)
def test_tables_that_do_not_fit_are_named(change, message):
    good = _two_trials()
    assert metric_table(good, resamples=5).num_rows == 12
    for make in (metric_table, effect_table):
        with pytest.raises(ValueError, match=message):
            make(change(good), resamples=5)


def test_a_missing_reference_is_named():
    with pytest.raises(ValueError, match=r"no arm 'b'.*\n.*none, a"):
        effect_table(_two_trials(), reference="b", resamples=5)
    effects = effect_table(_two_trials(), reference="a", resamples=5)
    assert set(effects["arm"].to_pylist()) == {"none"}
