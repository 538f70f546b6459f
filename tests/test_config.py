"""Configuration says what is wrong, and every setting is used."""

import ast
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tiny import ROOT, command

from cluster.config import build_config, read_toml
from cluster.errors import UserError
from featurization.config import FeaturizationConfig
from featurization.manifest import read_manifest
from featurization.selection import miller_half


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


@settings(deadline=None)  # a shared machine is slow at times
@given(st.integers(1, 50), st.integers(1, 10**6))
def test_a_selection_that_no_crystal_can_have_is_refused(m: int, most: int) -> None:
    points = len(miller_half(m))
    if points <= most:
        build(selection=f"miller:{m}", max_points=most)
        return
    with pytest.raises(UserError) as error:
        build(selection=f"miller:{m}", max_points=most)
    assert f"c.toml: selection = miller:{m} has {points:,} points" in error.value.problem
    assert f"max_points = {most:,}" in error.value.problem


@pytest.mark.parametrize(
    ("name", "value", "flag", "said"),
    [
        ("id_prop_label", "3x", "--label", "--label 3x: must be letters, digits and _"),
        ("b_iso", -1.0, "--b-iso", "--b-iso -1.0: must be ≥ 0"),
        ("symprec", 2.0, "--symprec", "--symprec 2.0: must be ≤ 1"),
        ("also_radiation", ["gamma"], "--radiation", "--radiation gamma: must be 'xray', "),
        ("selection", "cube:3", "--selection", "--selection cube:3: must be miller:m (whole m"),
    ],
)
def test_a_wrong_flag_is_called_what_the_user_calls_it(
    name: str, value: Any, flag: str, said: str
) -> None:
    with pytest.raises(UserError) as error:
        build_config(FeaturizationConfig, {name: value}, where="c.toml", flags={name: flag})
    assert error.value.problem.startswith(said)
    assert error.value.remedy.startswith(f"{flag}: ")
    assert not any(
        word in str(error.value) for word in ("c.toml", "Input", "Value error", "valid ")
    )
    assert name == flag.removeprefix("--").replace("-", "_") or name not in str(error.value)


def test_a_number_is_no_boolean() -> None:
    with pytest.raises(UserError, match=r"shard_mib = True: must be a number.*symprec = False"):
        build(shard_mib=True, symprec=False)


def test_the_key_of_a_wrong_value_is_explained() -> None:
    with pytest.raises(UserError) as error:
        build(b_iso="much")
    assert error.value.problem == "c.toml: b_iso = 'much': must be a valid number"
    assert "Debye" in error.value.remedy
    assert "max_points" not in error.value.remedy


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
        config = build(selection=f"miller:{m}", max_points=515_151)
        assert (config.miller_limit, config.q_max, config.drops_absences) == (m, None, False)
        assert build(selection=f"miller:{m}.0", max_points=515_151) == config
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
