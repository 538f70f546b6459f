"""`MODEL_CARD.md`: what a model is for and how well it answers, from its run's two JSON files.

The headings are those of Mitchell et al., Model Cards for Model Reporting, FAT* 2019.
"""

import json
import re
from pathlib import Path
from typing import Any

from cluster.errors import UserError
from cluster.files import write_text
from training.config import BLEND
from training.metrics import METRICS
from training.tasks import TASKS

FILE = "MODEL_CARD.md"
# What models are given that see other things than the points of a cloud, or more in them.
_GIVEN = {
    "solved": "what diffraction shows, and finds the atoms in it: it knows the elements and, where "
    "the structure is solved, the formula.",
    "composition_only": "the formula alone.",
    "lattice_only": "the cell of the source alone.",
    "majority": "nothing of a crystal.",
}


def write_card(run: Path) -> str:
    """Write the card of an evaluated run into its folder; return its text.

    Raises:
        UserError: the run has not been evaluated.
    """
    try:
        recorded, metrics = (
            json.loads((run / name).read_text(encoding="utf-8"))
            for name in ("config.json", "metrics.json")
        )
    except FileNotFoundError as error:
        raise UserError(
            f"{error.filename}: no such file", remedy="finish the training, or xtal evaluate RUN"
        ) from None
    text = card(recorded, metrics)
    write_text(run / FILE, text)
    return text


def card(recorded: dict[str, Any], metrics: dict[str, Any]) -> str:
    """Markdown from the contents of config.json and metrics.json; what they hold is escaped."""
    training, featurization = recorded["training"], recorded.get("featurization", {})
    classes, counts = metrics["classes"], metrics["class_counts"]
    made = recorded.get("provenance", {})
    fractions = training["validation_fraction"], training["test_fraction"]
    lines = [
        f"# {_plain(metrics['task'])}: {_plain(metrics['question'])}",
        "",
        f"{'A regression' if _of_number(metrics['task']) else 'A classifier'} of crystals, "
        f"model {_plain(training['model'])}. It is given "
        + _GIVEN.get(training["model"], "what diffraction shows, neither elements nor a formula."),
        "",
        "## What it answers",
        "",
        *_answers(training, metrics),
        "",
        "## Data",
        "",
        *_table(
            ["split", *classes],
            [[side, *(of.get(name, 0) for name in classes)] for side, of in counts.items()],
        ),
        "",
        f"Crystals of one group (a reduced formula, unless the source names groups) are all on one "
        f"side: {fractions[1]:.0%} of the groups for test, {fractions[0]:.0%} to choose the best "
        "epoch, the rest for training, by a hash of the group's name.",
        "",
        f"Content hash of the dataset: `{_code(recorded['identity']['content_hash'])}`.",
        "",
        f"{_plain(metrics['attribution'])} Whoever passes on the model or its predictions must "
        "keep to that.",
        "",
        f"## Results on {metrics['structures']:,} test crystals of {metrics['groups']:,} unseen "
        "groups",
        "",
        *_results(metrics["metrics"]),
        "",
        *_also(metrics.get("also", {})),
        "Intervals are of a bootstrap that draws whole groups. Rows of the confusion matrix are "
        f"true {'bins' if _of_number(metrics['task']) else 'classes'}, columns predicted ones:",
        "",
        *_table(
            ["", *classes],
            [[name, *row] for name, row in zip(classes, metrics["confusion_matrix"], strict=True)],
        ),
        "",
        *_calibrated(metrics["calibration"]),
        "",
        "## Settings",
        "",
        *_table(
            ["featurization", ""], [[name, _value(v)] for name, v in sorted(featurization.items())]
        ),
        "",
        *_table(["training", ""], [[name, _value(v)] for name, v in sorted(training.items())]),
        "",
        f"Made {_plain(made.get('created', 'at an unknown time'))} by commit "
        f"`{_code(made.get('commit', 'unknown'))}`.",
        "",
        "## Limits",
        "",
        "- Labels of materials databases are computed, not measured; their errors are the "
        "model's, too.",
        "- The metrics hold for crystals like those of the data. `out_of_distribution` marks what "
        "differs in density, kind of atoms or size of the cell, not every crystal that is "
        "misjudged.",
        "- The intensity of X-rays knows of chemistry: at the origin it is the square of the "
        "density of electrons.",
        *["- The classes cut a continuous quantity in two: near the cut no answer is sure."]
        * (len(classes) == 2),
        "",
        "## How to use it",
        "",
        "```sh",
        "xtal predict RUN crystals.cif --out predictions.csv",
        "```",
        "",
        "```python",
        "from training.predict import Predictor",
        "",
        'rows = Predictor("RUN")(structures)  # pymatgen structures, their dicts, or paths',
        "```",
        "",
        "Crystals are featurized with the settings above; a dataset of other settings is refused.",
    ]
    return "\n".join(lines) + "\n"


def _answers(training: dict[str, Any], metrics: dict[str, Any]) -> list[str]:
    """What is answered, and what its interval is."""
    models = training.get("members", 1) * (len(BLEND) if training["model"] == "blend" else 1)
    classes = [_plain(name) for name in metrics["classes"]]
    mean = f"It is the mean of {models} models"
    if models > 1:
        mean += ", half of them trees" if training["model"] == "blend" else " of different seeds"
    if _of_number(metrics["task"]):
        return [
            f"{_plain(metrics['question'])} `value` is the median of probabilities of "
            f"{len(classes)} bins, from {classes[0]} to {classes[-1]}; between `lower` and `upper` "
            "nine in ten such crystals are expected.",
            *[f"{mean}."] * (models > 1),
        ]
    return [
        f"{_plain(metrics['question'])} Classes: {', '.join(classes)}. "
        + (
            f"The probability is that of {classes[1]}."
            if len(classes) == 2
            else "There is a probability of each."
        ),
        f"{mean}; `lower` and `upper` are the extremes of their probabilities."
        if models > 1
        else "It is one model, so that no interval comes with its probabilities.",
    ]


def _also(others: dict[str, dict[str, Any]]) -> list[str]:
    """The results of the questions beside the first."""
    return [
        line
        for task, own in others.items()
        for line in (
            f"It also answers {_plain(task)}: {_plain(own['question'])} On "
            f"{own['structures']:,} test crystals:",
            "",
            *_results(own["metrics"]),
            "",
            *_calibrated(own["calibration"]),
            "",
        )
    ]


def _calibrated(calibration: dict[str, Any]) -> list[str]:
    return [
        f"A temperature of {_number(calibration['temperature'])}, fitted on validation, takes the "
        f"expected calibration error from {_number(calibration['ece'])} to "
        f"{_number(calibration['ece_at_temperature'])} on test. It is a diagnostic: no prediction "
        "is scaled by it."
    ]


def _results(metrics: dict[str, dict[str, Any]]) -> list[str]:
    return _table(
        ["metric", "value", "95 % interval"],
        [
            [METRICS[n].title if n in METRICS else n, _number(m["value"]), _interval(m)]
            for n, m in metrics.items()
        ],
    )


def _of_number(task: str) -> bool:
    return any(known.name == task and known.edges for known in TASKS.values())


def _table(head: list[str], rows: list[list[Any]]) -> list[str]:
    """A Markdown table."""
    both = [head, ["---"] * len(head)]
    texts = [[_plain(cell) for cell in head], both[1], *([_plain(c) for c in row] for row in rows)]
    return [f"| {' | '.join(row)} |" for row in texts]


def _plain(value: object) -> str:
    """Text without any meaning to Markdown or HTML, on one line."""
    return re.sub(r"([\\`*_{}\[\]()#+!|<>&~$])", r"\\\1", " ".join(str(value).split()))


def _code(value: object) -> str:
    """Text that can stand between backticks."""
    return re.sub(r"[^0-9A-Za-z.+-]", "?", str(value))


def _value(value: object) -> str:
    return "–" if value in (None, [], ()) else json.dumps(value, ensure_ascii=False).strip('"')


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _interval(metric: dict[str, Any]) -> str:
    return f"{_number(metric['low'])} … {_number(metric['high'])}"
