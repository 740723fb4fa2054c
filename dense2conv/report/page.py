"""``report.html`` of one run and ``compare_NAME.html`` of two: self-contained pages.

Style, script, pictures and data are inside the page; its Content-Security-Policy lets it load
nothing and run no script but its own. Without scripts it is a page to read, with them to explore.
"""

from __future__ import annotations

import base64
import hashlib
import math
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from dense2conv.files import write_atomically
from dense2conv.report import charts, compare, images, tables, units
from dense2conv.report.fields import read_fields
from dense2conv.report.kernels import read_bank
from dense2conv.report.run_folder import RunFolder
from dense2conv.report.verdict import count, judge, number
from dense2conv.shapes import InputError


def write_report(run_folder: Path) -> Path:
    """Write ``report.html`` into the folder of a run, atomically, and return its path.

    Parts that the run has not made yet are left out, with the command that makes them. Raises
    InputError where the folder holds no part of a run.
    """
    run = RunFolder.read(Path(run_folder))
    target = run.path / "report.html"
    write_atomically(target, render(run))
    return target


def write_comparison(first: Path, second: Path) -> Path:
    """Write ``compare_SECOND.html`` into the first run's folder, atomically, and return its path.

    Raises InputError where either folder holds no part of a run, or both are one.
    """
    if Path(first).resolve() == Path(second).resolve():
        raise InputError(f"{first} and {second} are one run; give the folders of two runs")
    runs = RunFolder.read(Path(first)), RunFolder.read(Path(second))
    target = runs[0].path / f"compare_{runs[1].path.resolve().name}.html"
    write_atomically(target, render_comparison(*runs))
    return target


def render(run: RunFolder) -> str:
    """The page of one run as text."""
    drawn = charts.curves({run.name: run.metrics}, _random_radius(run)) if run.metrics else ""
    return _filled(
        "run.html.jinja",
        view=_view(run),
        layers=[
            {
                "name": name,
                "title": _title(name),
                "centres": units.centre_map(run, name),
                "histograms": units.histograms(run, name),
                "histogram_note": units.histogram_note(run, name),
                "left_over": units.left_over(run, name),
            }
            for name in run.layers()
        ],
        unfinished=_unfinished(run),
        curves=drawn,
        curve_table=tables.curve_table(run),
        comparison=tables.comparison(run.summary),
        layer_rows=tables.layer_rows(run.summary),
        facts=tables.facts(run),
        config=run.config_text,
    )


def render_comparison(first: RunFolder, second: RunFolder) -> str:
    """The page of two runs, side by side, as text."""
    names = [first.name, second.name]
    if names[0] == names[1]:
        names = [str(first.path), str(second.path)]
    logs = dict(zip(names, (first.metrics, second.metrics), strict=True))
    return _filled(
        "compare.html.jinja",
        names=names,
        views=[_view(run) for run in (first, second)],
        figures=compare.figure_rows(first, second),
        layers=[
            {"title": _title(name), "rows": compare.layer_rows(first, second, name)}
            for name in sorted({*first.layers(), *second.layers()}, key=lambda name: int(name[5:]))
        ],
        curves=charts.curves(logs) if any(logs.values()) else "",
        curve_tables=[tables.curve_table(run) for run in (first, second)],
        without_config=[
            name for name, run in zip(names, (first, second), strict=True) if not run.config
        ],
        config_rows=compare.config_rows(first, second),
    )


def _view(run: RunFolder) -> dict[str, Any]:
    """What both pages show of a run: its verdict, and its layers' fields and kernels."""
    names = run.layers()
    layers = [
        {
            "title": _title(name),
            "fields": read_fields(run, name),
            "bank": read_bank(run, name),
            "no_kernel": bool((run.of_layer(name).get("kernel", np.zeros(1)) < 0).all()),
        }
        for name in names
    ]
    return {"name": run.name, "verdict": judge(run.summary), "layers": layers}


def _title(layer: str) -> str:
    return layer.replace("layer", "Layer ")


def _random_radius(run: RunFolder) -> float | None:
    value = number(run.summary, "random_radius")
    return value if value > 0 else None


def _unfinished(run: RunFolder) -> str:
    """Says so where the log ends before the training was to."""
    logged, _ = charts.series(run.metrics, "step")
    last = float(logged[-1]) if len(logged) else math.nan
    steps = number({"steps": run.setting("train.steps")}, "steps")
    return f"The log ends at step {count(last)} of {count(steps)}" if last < steps else ""


def _filled(template: str, **values: Any) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("dense2conv.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_uri"] = images.data_uri
    folder = files("dense2conv.report").joinpath("templates")
    script = folder.joinpath("report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(template).render(
        style=folder.joinpath("report.css").read_text(encoding="utf-8"),
        script=script,
        script_hash=f"sha256-{digest}",
        **values,
    )
