"""`dinoray evaluate`: how good are masks and labels, measured against true ones?"""

from __future__ import annotations

from typing import Annotated

import typer

from dinoray.cli.app import app, say
from dinoray.errors import BadRequest

evaluate = typer.Typer(no_args_is_help=True, help="Compare masks with true ones.")
app.add_typer(evaluate, name="evaluate")

KINDS = ("labels", "auto", "pairs", "cellpose", "dsb", "coco", "ctc")


@evaluate.command()
def cells(
    pred: Annotated[str, typer.Option("--pred", help="Folder, glob or URL of label images, or the --out of a "
                                     "`dinoray segment cells`.")],
    truth: Annotated[str, typer.Option("--truth", help="Folder, glob or URL of label images; with --kind, a labelled data set.")],
    kind: Annotated[str, typer.Option("--kind", help=f"{' | '.join(KINDS)}: layout of --truth.")] = "labels",
    images: Annotated[str | None, typer.Option("--images", help="The images of --truth, to be shown on the page.")] = None,
    ids: Annotated[list[str] | None, typer.Option("--ids", help="Only these image ids: separated by commas, or "
                                                  "FILE.json#key/key.")] = None,
    out: Annotated[str | None, typer.Option("--out", help="Folder or URL for evaluation.json, .parquet and .html.")] = None,
    thresholds: Annotated[str, typer.Option("--thresholds", help="IoU thresholds of the table.")] = "0.5,0.75",
    bootstrap: Annotated[int, typer.Option("--bootstrap", help="Draws for the 95 % intervals; 0 for none.")] = 10_000,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the draws.")] = 0,
    groups: Annotated[str | None, typer.Option("--groups", help="Groups of images: FILE.json[#key/key] of image id: group, or a "
                                               "CSV or Parquet table with item_id.")] = None,
    by: Annotated[str | None, typer.Option("--by", help="The column (or key) of --groups that names the group.")] = None,
    allow_missing: Annotated[bool, typer.Option("--allow-missing", help="Score a missing prediction as empty.")] = False,
    max_pixels: Annotated[int, typer.Option("--max-pixels", help="Largest declared Y*X; above it a label image is refused before "
                                            "it is decoded.")] = 2**28,
) -> None:
    """SEG, DET, OP_CSB, AP, F1 and PQ of instance masks, image-mean and pooled, with intervals (docs/evaluation.md)."""
    from dinoray.config.building import build_job
    from dinoray.config.labelled import LabelledSource
    from dinoray.evaluation import evaluate_cells, output_notes, read_groups, table_lines, write_evaluation
    from dinoray.io.decoded import Limits
    from dinoray.io.label_pairs import choose, list_predictions, list_truth, pair_up
    from dinoray.wording import plural

    if kind not in KINDS:
        raise BadRequest(f"unknown layout {kind!r}", where="--kind", todo=f"one of {', '.join(KINDS)}")
    if kind == "dsb" and images is not None:
        raise BadRequest("a DSB folder holds its images itself", where="--images", todo="leave --images out")
    if by is not None and groups is None:
        raise BadRequest("--by names a column of --groups", where="--by", todo="give --groups TABLE")
    if max_pixels < 1:
        raise BadRequest(f"{max_pixels} pixels", where="--max-pixels", todo="give a number above 0")
    # bytes follow from pixels: no label has more than 8
    limits = Limits(max_pixels=max_pixels, max_bytes=max(Limits.max_bytes, 8 * max_pixels),
                    max_file_bytes=max(Limits.max_file_bytes, 8 * max_pixels))
    chosen = [name.strip() for text in ids or () for name in text.split(",") if name.strip()]
    if images is not None:
        source = build_job(LabelledSource, {"images": images, "labels": truth, "kind": "auto" if kind == "labels" else kind})
    else:
        source = truth if kind == "labels" else build_job(LabelledSource, {"images": truth, "kind": kind})
    notes: list[str] = []
    found = list_truth(source, notes.append)
    pairs, unused = pair_up(list_predictions(pred), found, only=choose(found, chosen) if chosen else None,
                            allow_missing=allow_missing)
    settings = {"pred": pred, "truth": truth, "kind": kind, "images": images, "ids": ids, "groups": groups, "by": by}
    result = evaluate_cells(pairs, thresholds=_numbers(thresholds), resamples=bootstrap, seed=seed, limits=limits,
                            settings=settings, groups=read_groups(groups, by) if groups else None)
    result.notes[:0] = [*notes, *output_notes(pred)]
    if unused:
        result.notes.append(f"{plural(len(unused), 'prediction')} without true labels not scored: {', '.join(unused[:5])}"
                            + (f" and {len(unused) - 5:,} more" if len(unused) > 5 else ""))
    for note in result.notes:
        say(note)
    for line in table_lines(result.summary):
        say(line)
    for name, summary in result.groups.items():
        for line in table_lines(summary, name):
            say(line)
    for name in write_evaluation(result, out) if out else ():
        say(name)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise BadRequest(f"not numbers: {text!r}", where="--thresholds", todo="such as 0.5,0.75") from None


@evaluate.command()
def volume(
    pred: Annotated[str, typer.Option("--pred", help="Labels: a volume, or the --out of a `dinoray segment volume`.")],
    truth: Annotated[str, typer.Option("--truth", help="True labels: OME-Zarr, Zarr, N5, HDF5, TIFF stack; local or s3://.")],
    classes: Annotated[str | None, typer.Option("--classes", help="Names of the labels 0, 1, ..: scores of classes. Without them "
                                                "labels are instances.")] = None,
    region: Annotated[str | None, typer.Option("--region", help="Part of the truth, in its voxels: z0:z1,y0:y1,x0:x1.")] = None,
    unknown: Annotated[int | None, typer.Option("--unknown", help="Label of the truth where nothing is known.")] = None,
    pred_dataset: Annotated[str | None, typer.Option("--pred-dataset", help="Path of the array inside --pred.")] = None,
    truth_dataset: Annotated[str | None, typer.Option("--truth-dataset", help="Path of the array inside --truth.")] = None,
    pred_voxel_size: Annotated[str | None, typer.Option("--pred-voxel-size", help="Level of --pred in nm (n, or z,y,x), or its "
                                                        "voxel size where it states none.")] = None,
    truth_voxel_size: Annotated[str | None, typer.Option("--truth-voxel-size", help="The same of --truth.")] = None,
    out: Annotated[str | None, typer.Option("--out", help="Folder or URL for evaluation.json.")] = None,
) -> None:
    """Of classes IoU, Dice, precision and recall; of instances adapted Rand error, variation of information, AP
    (docs/evaluation.md)."""
    from dinoray.config.volume_labels import box_of
    from dinoray.io.stores import open_store
    from dinoray.volume_evaluation import evaluate_volume, open_labels

    try:
        box = None if region is None else box_of(region, "--region")
    except ValueError as error:
        raise BadRequest(str(error), where="--region", todo="write 0:100,0:512,0:512") from error
    names = [name.strip() for name in (classes or "").split(",") if name.strip()]
    settings = {"pred": pred, "truth": truth, "classes": names, "region": region, "unknown": unknown}
    with open_labels(pred, dataset=pred_dataset, voxel_nm=_sizes(pred_voxel_size)) as found, \
            open_labels(truth, dataset=truth_dataset, voxel_nm=_sizes(truth_voxel_size)) as true:
        result = evaluate_volume(found, true, classes=names, region=box, unknown=unknown, settings=settings)
    for line in result.lines():
        say(line)
    if out:
        store = open_store(out)
        store.put("evaluation.json", result.as_json())
        say(f"{store.url}/evaluation.json")


def _sizes(text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    found = tuple(_numbers(text))
    if len(found) not in (1, 3) or min(found) <= 0:
        raise BadRequest(f"{text!r} is neither one voxel size nor three", where="--pred-voxel-size, --truth-voxel-size",
                         todo="write 8, or 40,4,4 (z, y, x) in nm")
    return found
