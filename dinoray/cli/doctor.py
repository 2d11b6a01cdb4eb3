"""`dinoray doctor`: is this machine, are these weights, is this cluster fit for a run? Exit 1 when something fails."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import typer

from dinoray.cli.app import app, say
from dinoray.doctor.findings import Finding, lines, verdict

doctor = typer.Typer(invoke_without_command=True, help="Check this machine, weights, or a Ray cluster before a run.")
app.add_typer(doctor, name="doctor")


@doctor.callback()
def machine(context: typer.Context,
            out: Annotated[str | None, typer.Option("--out", help="Also try the store behind this output.")] = None,
            source: Annotated[str | None, typer.Option("--source", help="Also read the first image of this source.")] = None,
            ) -> None:
    """Check this machine: cores, memory, disk, versions, device, and with --out and --source the storage."""
    if context.invoked_subcommand is not None:
        return
    from dinoray.doctor.machine import check_machine
    from dinoray.doctor.storage import check_output, check_source
    from dinoray.doctor.versions import check_versions

    findings = [*check_versions(), *check_machine()]
    if out is not None:
        findings += check_output(out)
    if source is not None:
        findings.append(check_source(source))
    _tell(findings)


@doctor.command()
def weights(weights: Annotated[str, typer.Argument(help="File, folder, hub id, or random[:SEED].")],
            model: Annotated[str | None, typer.Option("--model", help="Variant, where the weights do not say.")] = None,
            accept_license: Annotated[bool, typer.Option("--accept-dinov3-license",
                                                         help="You accept the DINOv3 License.")] = False) -> None:
    """Look into weights: coverage, digest, ranges per layer, LayerScale, NaN."""
    from dinoray.doctor.weights import examine_weights, table

    found = examine_weights(weights, model, accept_license=accept_license)
    for line in table(found.layers) if found.layers else []:
        say(line)
    _tell(found.findings)


@doctor.command()
def cluster(address: Annotated[str | None, typer.Option(
        "--address", help="The dashboard, http://HOST:8265 [RAY_API_SERVER_ADDRESS, else this machine's].")] = None) -> None:
    """Look at a Ray cluster: who can reach it without a token, its nodes, their versions, cores per GPU."""
    from dinoray.cluster.doctor import check_cluster

    _tell(check_cluster(address))


def _tell(findings: Iterable[Finding]) -> None:
    findings = list(findings)
    for line in lines(findings):
        say(line)
    say(verdict(findings))
    if any(finding.level == "fail" for finding in findings):
        raise typer.Exit(1)
