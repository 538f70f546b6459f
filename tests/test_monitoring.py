"""What Prometheus reads, and the dashboard for Grafana that shows it."""

import json
import re
import shutil
import socket
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from small import TINY

from ablation.grid import GridConfig
from ablation.run import run_grid
from ablation.status import Standing
from cluster.commands import DASHBOARD
from cluster.ray_cluster import GRAFANA, PROMETHEUS, TARGETS
from training.config import TrainingConfig

BOARD = json.loads(DASHBOARD.read_text(encoding="utf-8"))
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]]
# Labels that Prometheus adds itself: where it has read a number, and what targets.json says.
_OWN = {"instance", "job", "run"}


class Seen(Exception):
    pass


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[tuple[str, int] | None]:
    """A real one with the configuration of a machine that works alone, where it is installed.

    Its address, and the port at which it looks for the work's numbers.
    """
    if (program := shutil.which("prometheus")) is None:
        yield None
        return
    folder, at = tmp_path / "prometheus", f"127.0.0.1:{free_port()}"
    folder.mkdir()
    shutil.copy(GRAFANA / PROMETHEUS, folder)
    (group,) = json.loads((GRAFANA / TARGETS).read_text())
    (folder / TARGETS).write_text(
        json.dumps([group | {"targets": [f"127.0.0.1:{(port := free_port())}"]}])
    )
    words = [program, f"--config.file={folder / PROMETHEUS}", f"--web.listen-address={at}"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([*words, f"--storage.tsdb.path={folder / 'data'}"], stderr=log)
    yield at, port
    process.terminate()
    process.wait(20)


def answered(prometheus: str, expression: str) -> bool:
    """Whether it has numbers for an expression of the dashboard, all runs chosen.

    Raises:
        HTTPError: it does not understand the expression.
    """
    query = urllib.parse.urlencode({"query": expression.replace("$run", ".*")})
    with urllib.request.urlopen(f"http://{prometheus}/api/v1/query?{query}", timeout=5) as answer:
        return bool(json.load(answer)["data"]["result"])


def labels_of(expression: str) -> set[str]:
    """Labels that an expression selects or sums by."""
    selected = {name for part in re.findall(r"\{(.*?)\}", expression) for name in asked(part)}
    summed = re.findall(r"by \((.*?)\)", expression)
    return selected | {name.strip() for part in summed for name in part.split(",")}


def asked(selector: str) -> list[str]:
    return re.findall(r'(\w+)=~?"', selector)


@pytest.mark.slow
def test_prometheus_has_each_number_that_the_dashboard_shows(
    dataset: Path, tmp_path: Path, prometheus: tuple[str, int] | None
) -> None:
    """Without Prometheus: the text that it would read has them."""
    port = prometheus[1] if prometheus else free_port()
    wanted = {name for each in EXPRESSIONS for name in re.findall(r"ray_\w+", each)}
    assert len(wanted) > 15
    missing, silent = set(wanted), list(EXPRESSIONS) if prometheus else []

    def progress(at: Standing) -> None:
        nonlocal missing, silent
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                lines = answer.read().decode().splitlines()
        except OSError:
            return  # not there yet
        found: dict[str, set[str]] = {}
        for line in lines:
            if match := re.match(r"(ray_\w+)\{(.*)\}", line):
                found.setdefault(match[1], set()).update(asked(match[2]))
        missing = wanted - set(found)
        if not missing:
            for expression in EXPRESSIONS:
                here = set.union(_OWN, *(found[n] for n in re.findall(r"ray_\w+", expression)))
                assert labels_of(expression) <= here, expression
            if prometheus:
                silent = [each for each in silent if not answered(prometheus[0], each)]
            if not silent:
                raise Seen

    grid = GridConfig(
        dataset=str(dataset),
        arms=[{"name": "none"}, {"name": "basis_only"}],
        seeds=tuple(range(40)),
        processes=1,
        metrics_port=port,
        training=TrainingConfig(**TINY),
    )
    with suppress(Seen):
        run_grid(grid, tmp_path / "out", progress)
    assert (missing, silent) == (set(), [])  # which the grid has not told before its end


def test_the_dashboard_is_one_that_grafana_imports_as_it_is() -> None:
    """As Grafana exports them; no identity of a data source of somebody's own is in it."""
    assert BOARD["uid"] == "crystal-genome"
    assert BOARD["schemaVersion"] >= 36
    assert "id" not in BOARD
    assert "__inputs" not in BOARD
    variables = {each["name"]: each for each in BOARD["templating"]["list"]}
    assert variables["datasource"]["query"] == "prometheus"
    source = {"type": "prometheus", "uid": "${datasource}"}
    ids = [panel["id"] for panel in BOARD["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in PANELS:
        assert panel["type"] in ("timeseries", "stat", "bargauge")
        assert panel["title"]
        assert panel["datasource"] == source
        references = [target["refId"] for target in panel["targets"]]
        assert references == sorted(set(references))
        assert all(target["datasource"] == source for target in panel["targets"])
    for expression in EXPRESSIONS:
        used = set(re.findall(r"\$\{?(\w+)", expression))
        assert used <= set(variables), expression
        assert 'run=~"$run"' in expression  # one Prometheus may know of several runs


def test_panels_do_not_lie_upon_each_other() -> None:
    def cells(panel: dict[str, Any]) -> set[tuple[int, int]]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        return {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}

    for one, other in combinations(BOARD["panels"], 2):
        assert not cells(one) & cells(other), (one["title"], other["title"])


def test_prometheus_takes_its_configuration() -> None:
    if (promtool := shutil.which("promtool")) is None:
        pytest.skip("promtool is not installed (apt install prometheus)")
    words = [promtool, "check", "config", str(GRAFANA / PROMETHEUS)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout + done.stderr  # it finds the file of targets
    (group,) = json.loads((GRAFANA / TARGETS).read_text())
    assert group == {"targets": ["127.0.0.1:8080"], "labels": {"run": "local"}}
