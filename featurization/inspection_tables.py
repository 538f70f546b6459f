"""What `xtal inspect` prints: a dataset, and a crystal's reflections."""

from typing import Any

from rich.table import Table

from cluster.terminal import out, summary

_TOP_GROUPS = 8


def show_dataset(answer: dict[str, Any]) -> None:
    config, stages, points = answer["config"], answer["reject_stages"], answer["points_a_crystal"]
    groups, made = answer["space_groups"], answer["provenance"]
    also = config.get("also_radiation", ())
    summary(
        f"dataset {answer['dataset']}",
        {
            "structures": answer["structures"],
            "rejected": f"{answer['rejected']:,}"
            + "".join(f"; {stage} {count:,}" for stage, count in stages.items()),
            "points stored": f"{answer['points']:,}; a crystal {points['min']:,} to "
            f"{points['max']:,}, median {points['median']:,.0f}",
            "radiation": ", ".join((config["radiation"], *also)),
            "selection": f"{config['selection']} of the {config['cell']} cell",
            "symmetry": f"within {config['symprec']:g} Å",
            "Debye–Waller B": f"{config['b_iso']:g} Å²",
            "sources": "\n".join(
                f"{source['kind']}, {source['records']:,} records: {source['spec']}"
                for source in answer["sources"]
            ),
            "licence": answer["attribution"],
            "crystal systems": ", ".join(
                f"{name} {count:,}" for name, count in answer["crystal_systems"].items() if count
            ),
            "space groups": ", ".join(
                f"{group['symbol']} {group['structures']:,}" for group in groups[:_TOP_GROUPS]
            )
            + (f" and {len(groups) - _TOP_GROUPS} more" if len(groups) > _TOP_GROUPS else ""),
            "on disk": f"{answer['bytes'] / 1e6:,.1f} MB, {answer['shards']} shards",
            "content hash": answer["content_hash"][:16],
            "made": f"{made.get('created', '?')} by {made.get('commit', '?')}",
        },
    )
    if answer["labels"]:
        table = Table("label", "unit", "known", "min", "median", "max", title_justify="left")
        for name, values in answer["labels"].items():
            numbers = (_number(values[k]) for k in ("min", "median", "max"))
            table.add_row(name, values["unit"], f"{values['known']:,}", *numbers)
        out.print(table)


def show_crystal(answer: dict[str, Any], top: int) -> None:
    cell, group, unit = answer["cell"], answer["space_group"], answer["intensity_unit"]
    origin = {} if answer["origin"] is None else {"I(000)": f"{answer['origin']:.6g} {unit}"}
    summary(
        f"crystal {answer['id']}",
        {
            "formula": answer["formula"],
            "space group": f"{group['symbol']} ({group['number']}), {group['crystal_system']}, "
            f"point group {group['point_group']}",
            f"{answer['config']['cell']} cell": "a, b, c = "
            + ", ".join(f"{cell[k]:.4f}" for k in ("a", "b", "c"))
            + " Å\nα, β, γ = "
            + ", ".join(f"{cell[k]:.3f}" for k in ("alpha", "beta", "gamma"))
            + f"°\nV = {cell['volume']:.3f} Å³",
            **{
                name: f"{label['value']:.6g} {label['unit']}"
                for name, label in answer["labels"].items()
            },
            "points stored": answer["points"],
            "complete to": f"|q| = {answer['complete_to']:.4f} 1/Å",
            **origin,
        },
    )
    rows = answer["reflections"]
    others = [name for name in rows[0] if name.startswith("intensity_")] if rows else []
    columns = ("h k l", "|q| (1/Å)", "d (Å)", "I", "m", "I·m (%)")
    table = Table(
        *columns,
        *(name.removeprefix("intensity_") for name in others),
        padding=0 if others else (0, 1),
    )
    for column in table.columns:
        column.justify, column.overflow = "right", "fold"
    for row in rows[:top]:
        strength = row["intensity"] * row["multiplicity"]
        strongest = rows[0]["intensity"] * rows[0]["multiplicity"] or 1.0
        table.add_row(
            " ".join(map(str, row["hkl"])),
            f"{row['q']:.4f}",
            f"{row['d']:.4f}",
            _number(row["intensity"]),
            str(row["multiplicity"]),
            f"{100 * strength / strongest:.2f}",
            *(_number(row[name]) for name in others),
        )
    out.print(table)
    radiation = answer["config"]["radiation"]
    out.print(f"{min(top, len(rows))} of {len(rows)} sets of equivalent reflections")
    out.print(f"I = |F|²/V² in {unit}, {radiation}; m counts both of a pair ±q")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
