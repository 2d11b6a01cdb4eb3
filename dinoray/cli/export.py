"""`dinoray export`: an output as profiles for pycytominer, or as one table."""

from __future__ import annotations

from typing import Annotated

import typer

from dinoray.cli.app import Out, app, say
from dinoray.errors import BadRequest


@app.command()
def export(
    out: Out,
    to: Annotated[str | None, typer.Option("--to", help="File or URL: .parquet, .csv, .csv.gz [OUT/profiles/...].")] = None,
    pycytominer: Annotated[bool, typer.Option("--pycytominer", help="Wide profiles whose columns pycytominer finds.")] = False,
    level: Annotated[str | None, typer.Option("--level", help="site | well | image | object: what a profile is of [well].")] = None,
    aggregate: Annotated[str | None, typer.Option("--aggregate", help="mean | median over the rows of a profile [mean].")] = None,
    feature: Annotated[list[str] | None, typer.Option("--feature", help="cls, patch_mean, cls_l05, ...; repeat, or "
                                                      "separate with commas [all].")] = None,
    format: Annotated[str | None, typer.Option("--format", help="parquet | csv | csv.gz [as --to ends, else parquet].")] = None,
    compartment: Annotated[str | None, typer.Option("--compartment", help="Image | Cells | Nuclei | Cytoplasm: prefix of feature "
                                                    "columns [Cells].")] = None,
    partial: Annotated[bool, typer.Option("--partial", help="Export what an unfinished or damaged output has.")] = False,
) -> None:
    """The features as one file: wide profiles (--pycytominer), or the feature table as it is (docs/profiling.md)."""
    from dinoray.export.plain import export_table
    from dinoray.export.profiles import export_profiles

    features = [name.strip() for text in feature or () for name in text.split(",") if name.strip()] or None
    if pycytominer:
        done = export_profiles(out, to, level=level or "well", how=aggregate or "mean", features=features, fmt=format,
                               compartment=compartment, partial=partial)
    else:
        for name, value in (("--level", level), ("--aggregate", aggregate), ("--compartment", compartment)):
            if value is not None:
                raise BadRequest(f"{name} belongs to profiles", todo="add --pycytominer, or leave it out for the table as it is")
        done = export_table(out, to, features=features, fmt=format, partial=partial)
    for note in done.notes:
        say(note)
    say(f"{done.target}: {done.rows} rows, {done.columns} columns")
