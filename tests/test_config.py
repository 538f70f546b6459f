"""Configuration says what is wrong, and every setting is used."""

import ast
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError
from tiny import ROOT, command

from cluster.config import build_config, read_toml
from cluster.errors import UserError
from featurization.config import FeaturizationConfig
from featurization.manifest import read_manifest


def build(**values: Any) -> FeaturizationConfig:
    return build_config(FeaturizationConfig, values, where="c.toml")


def test_toml_with_an_unknown_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.toml"
    path.write_text('radiaton = "xray"\n[self]\nx = 1\n', encoding="utf-8")
    words = ("featurize", "prototypes:2", tmp_path / "out", "--config", path)
    assert command(monkeypatch, *words) == 2
    text = capsys.readouterr().err
    for part in (str(path), "radiaton: unknown key", "self: unknown key"):
        assert part in text
    for name in FeaturizationConfig.model_fields:
        assert name in text


def test_flags_win_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.toml"
    path.write_text('radiation = "neutron"\nb_iso = 1\nselection = "miller:1"\n')
    words = ("featurize", "prototypes:2", tmp_path / "out", "--config", path, "--b-iso", "2")
    assert command(monkeypatch, *words) == 0
    config = FeaturizationConfig(**read_manifest(tmp_path / "out")["config"])
    assert (config.radiation, config.b_iso, config.selection) == ("neutron", 2.0, "miller:1")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("radiation", "gamma"),
        ("radiation", 1),
        ("cell", "Primitive"),
        ("selection", "cube:3"),
        ("selection", 3),
        ("symprec", 0),
        ("symprec", 1.5),
        ("symprec", float("nan")),
        ("b_iso", -0.1),
        ("b_iso", float("nan")),
        ("b_iso", float("inf")),
        ("absences", True),
        ("absence_tolerance", 1.0),
        ("max_points", 0),
        ("max_points", 1.5),
        ("shard_structures", 0),
        ("id_prop_label", []),
    ],
)
def test_wrong_values_are_named(name: str, value: Any) -> None:
    with pytest.raises(UserError) as error:
        build(**{name: value})
    assert error.value.problem.startswith(f"c.toml: {name} = {value!r}: ")
    assert name in error.value.remedy


def test_all_wrong_values_are_named_at_once() -> None:
    with pytest.raises(UserError) as error:
        build(symprec=-1, cell="x", colour="red")
    assert all(name in error.value.problem for name in ("symprec", "cell", "colour"))


def test_none_means_default_and_a_config_is_frozen() -> None:
    config = build(radiation=None, symprec=None)
    assert config == FeaturizationConfig()
    with pytest.raises(ValidationError):
        config.symprec = 0.2  # type: ignore[misc]


@pytest.mark.parametrize("data", [b"a = ", b"\xff", b"a = 1\na = 2", None])
def test_files_that_are_not_toml(tmp_path: Path, data: bytes | None) -> None:
    path = tmp_path / "c.toml"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(UserError, match=r"c\.toml"):
        read_toml(path)
    with pytest.raises(UserError):
        read_toml(tmp_path)


@given(st.integers(-5, 60))
def test_miller(m: int) -> None:
    if 1 <= m <= 50:
        config = build(selection=f"miller:{m}")
        assert (config.miller_limit, config.q_max, config.drops_absences) == (m, None, False)
        assert build(selection=f"miller:{m}.0") == config
    else:
        with pytest.raises(UserError, match="miller"):
            build(selection=f"miller:{m}")


@given(st.floats(allow_nan=True, allow_infinity=True))
@example(1.2)
@example(20.0)
@example(1e-5)
def test_sphere(q: float) -> None:
    if 0 < q <= 4:
        config = build(selection=f"sphere:{q!r}")
        assert (config.miller_limit, config.q_max, config.drops_absences) == (None, q, True)
        # What is written into a manifest reads back as the same.
        assert build(selection=config.selection) == config
    else:
        with pytest.raises(UserError, match="sphere"):
            build(selection=f"sphere:{q!r}")


@given(
    st.text(max_size=12)
    | st.builds("{}:{}".format, st.sampled_from(["miller", "sphere"]), st.text(max_size=5))
)
@example("miller:3:1")
@example("sphere:")
@example(":")
@example("miller:nan")
@example("sphere:-0.0")
def test_any_selection_is_one_of_the_two_or_refused(text: str) -> None:
    try:
        config = build(selection=text)
    except UserError:
        return
    assert (config.miller_limit is None) != (config.q_max is None)
    assert config.selection.partition(":")[0] == text.partition(":")[0]
    assert build(selection=config.selection) == config


def test_every_setting_is_read_somewhere() -> None:
    read = set()
    for path in (ROOT / "featurization").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                owner = ast.unparse(node.value)
                is_own = path.name == "config.py" and owner == "self"
                if owner in ("config", "self.config") or is_own:
                    read.add(node.attr)
    unused = set(FeaturizationConfig.model_fields) - read
    assert unused == set()
    assert "no_such_setting" not in read
