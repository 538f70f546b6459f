"""Quantities without a threshold: bins, quantiles, errors, and a run from dataset to prediction."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error
from small import tiny
from tiny import document, run, write_lines

from training.evaluate import evaluate_run
from training.numbers import errors, quantiles
from training.predict import Predictor
from training.tasks import TASKS, UNKNOWN, task_of
from training.train import train

EDGES = (0.0, 1.0, 2.0, 4.0)


def test_bins_are_tenths_of_a_decade() -> None:
    task = task_of("log_bulk_modulus")
    target = task.target(np.array([100.0, 99.9, 79.4, 1e-3, 1e5, 0.0, -5.0, np.nan, np.inf]))
    named = [task.classes[c] if c != UNKNOWN else None for c in target]
    assert named[:2] == ["100–126 GPa", "79.4–100 GPa"]
    assert named[2] == "63.1–79.4 GPa"
    assert named[3:5] == [task.classes[0], task.classes[-1]]
    assert named[5:] == [None] * 4
    for task in TASKS.values():
        assert not task.edges or len(task.edges) == len(task.classes) + 1
    with pytest.raises(ValueError, match="has no threshold"):
        task_of("log_bulk_modulus", 3.0)


@given(
    st.lists(st.floats(0, 1), min_size=3, max_size=3).filter(lambda p: sum(p) > 1e-3),
    st.floats(0.01, 0.99),
)
def test_quantiles_cut_the_distribution_at_their_level(shares: list[float], level: float) -> None:
    probability = np.array([shares]) / sum(shares)
    (cut,) = quantiles(EDGES, probability, (level,))[0]
    pieces = zip(EDGES, EDGES[1:], probability[0], strict=False)
    below = sum(p * np.clip((cut - low) / (high - low), 0, 1) for low, high, p in pieces)
    assert below == pytest.approx(level, abs=1e-9)


def test_errors_are_those_of_the_median() -> None:
    random = np.random.default_rng(0)
    value = random.uniform(0, 4, 300)
    probability = random.dirichlet(np.ones(3), 300)
    groups = [f"g{i // 2}" for i in range(300)]
    found = errors(value, EDGES, probability, groups, resamples=200)
    middle = quantiles(EDGES, probability, (0.5,))[:, 0]
    for name, oracle in (
        ("mae", mean_absolute_error),
        ("rmse", root_mean_squared_error),
        ("r2", r2_score),
    ):
        assert found[name].value == pytest.approx(oracle(value, middle))
        assert found[name].low < found[name].value < found[name].high


def test_honest_distributions_cover_what_they_say() -> None:
    random = np.random.default_rng(1)
    probability = random.dirichlet(np.ones(3), 4000)
    bins = (random.random((4000, 1)) > probability.cumsum(axis=1)).sum(axis=1)
    edges = np.array(EDGES)
    value = edges[bins] + random.random(4000) * np.diff(edges)[bins]
    groups = [str(i) for i in range(4000)]
    found = errors(value, EDGES, probability, groups, resamples=100)["coverage"]
    assert found.value == pytest.approx(0.9, abs=0.02)
    sure = np.eye(3)[probability.argmax(axis=1)]
    assert errors(value, EDGES, sure, groups, resamples=100)["coverage"].value < 0.7


def test_a_run_of_a_number(tmp_path: Path) -> None:
    """Bulk modulus falls with the cell's edge: the network must see that."""
    formulas = [("Cs", x) for x in ("F", "Cl", "Br", "I")] + [("K", "Cl"), ("Rb", "I")]
    documents = [
        document(f"m{k}-{i}", a, elements, bulk_modulus={"vrh": 400 * (3 / a) ** 4})
        for k, elements in enumerate(formulas * 4)
        for i, a in enumerate(np.linspace(3.2, 6.0, 8) + 0.01 * k)
    ]
    for number, each in enumerate(documents):
        each["formula_pretty"] = f"X{number}"
    run(write_lines(tmp_path / "a.jsonl", documents), tmp_path / "data")
    config = tiny(task="log_bulk_modulus", model="harmonic", epochs=40)
    answer = train(tmp_path / "data", tmp_path / "run", config)
    assert set(answer["metrics"]) == {"mae", "rmse", "r2", "coverage"}
    assert answer["metrics"]["r2"]["value"] > 0.5
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == answer
    _compared(tmp_path, answer)
    card = (tmp_path / "run" / "MODEL_CARD.md").read_text()
    assert "mae" in card
    assert "A regression of crystals" in card
    assert "`value` is the median of probabilities of 24 bins" in card
    assert "classifier" not in card
    rows = Predictor(tmp_path / "run")([str(tmp_path / "a.jsonl")])
    assert len(rows) == len(documents)
    for row, each in zip(rows, documents, strict=True):
        assert row["lower"] < row["value"] < row["upper"]
        assert row["prediction"] == f"{10 ** row['value']:.3g} GPa"
        assert abs(row["value"] - np.log10(each["bulk_modulus"]["vrh"])) < 0.7


def _compared(folder: Path, answer: dict[str, Any]) -> None:
    """With another run, by the errors of the number, not by how well its bins are told apart."""
    config = tiny(task="log_bulk_modulus", model="majority", trees=2)
    other = train(folder / "data", folder / "other", config)
    found = evaluate_run(folder / "run", against=folder / "other")["against"]
    assert set(found["bootstrap"]) == {"mae", "rmse", "r2", "coverage"}
    assert "delong" not in found
    for name, pair in found["bootstrap"].items():
        value, reference = answer["metrics"][name]["value"], other["metrics"][name]["value"]
        assert pair["value"] == pytest.approx(value)
        assert pair["reference"] == pytest.approx(reference)
        assert pair["difference"]["value"] == pytest.approx(value - reference)
    assert found["bootstrap"]["mae"]["difference"]["value"] < 0
    itself = evaluate_run(folder / "run", against=folder / "run")["against"]["bootstrap"]
    assert all(pair["difference"]["value"] == 0 for pair in itself.values())
