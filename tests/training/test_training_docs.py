"""docs/training.md and docs/training-volumes.md against the code.

`python -m tests.training.test_training_docs` prints their tables anew.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from dinoray.config import TrainDistanceMapJob, build_job, read_job_file
from dinoray.config.augmentation import Augmentation
from dinoray.config.fusion import TrainContextFusionJob, VolumeAugmentation
from dinoray.config.labelled import LabelledSource
from dinoray.config.memory_levels import LEVELS
from dinoray.config.training import TRAINING_EXECUTION_FIELDS, TrainingJob
from dinoray.config.volume_labels import LabelledVolume
from dinoray.request import KEY
from dinoray.training.card import model_card
from dinoray.training.journal import BOARD, HISTORY_KEY
from dinoray.training.standing import CHECKPOINT, PROGRESS_KEY
from dinoray.training.states import PREFIX

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "training.md").read_text()
VOLUMES = (ROOT / "docs" / "training-volumes.md").read_text()


def rows(model: type[BaseModel], without: type[BaseModel] | None = None) -> list[str]:
    """A line of a table for each field: its name, default and docstring."""
    lines = []
    for name, field in model.model_fields.items():
        if without is None or name not in without.model_fields:
            default = "needed" if field.is_required() else _shown(field.get_default(call_default_factory=True))
            marked = "*" if model in (TrainingJob, TrainDistanceMapJob) and name in TRAINING_EXECUTION_FIELDS else ""
            lines.append(f"| `{name}`{marked} | {default} | {' '.join(str(field.description).split())} |")
    return lines


def _shown(value: object) -> str:
    if isinstance(value, BaseModel):
        return "see below"
    if value is None or value == ():
        return "none"
    return f"`{list(value)}`" if isinstance(value, tuple) else f"`{str(value).lower() if isinstance(value, bool) else value}`"


TABLES = [rows(TrainingJob), rows(TrainDistanceMapJob, TrainingJob), rows(LabelledSource), rows(Augmentation)]
VOLUME_TABLES = [rows(TrainContextFusionJob, TrainingJob), rows(LabelledVolume), rows(VolumeAugmentation)]


@pytest.mark.parametrize(("text", "tables"), [(TEXT, TABLES), (VOLUMES, VOLUME_TABLES)], ids=["cells", "volumes"])
def test_every_field_stands_there_with_its_default_and_docstring(text: str, tables: list[list[str]]) -> None:
    assert all(len(table) > 6 for table in tables)
    known = {row for table in tables for row in table}
    missing = [row for row in known if row not in text]
    assert not missing, "\n".join(missing)
    fields = text[text.index("## Fields of the job"):]
    assert [line for line in fields.splitlines() if line.startswith("| `") and line not in known] == []


def test_the_levels_of_memory_stand_there() -> None:
    fields = list(next(iter(LEVELS.values())))
    header = next(line for line in VOLUMES.splitlines() if line.startswith("| level |"))
    assert sorted(header.strip("| ").split(" | ")[1:]) == sorted(fields)
    for name, values in LEVELS.items():
        cells = [str(values[field]).lower() if isinstance(values[field], bool) else str(values[field])
                 for field in header.strip("| ").split(" | ")[1:]]
        assert f"| `{name}` | {' | '.join(cells)} |" in VOLUMES


def test_what_it_says_of_the_output_is_so() -> None:
    for name in (KEY, PROGRESS_KEY, HISTORY_KEY, f"{BOARD}/", f"{PREFIX}/", f"{CHECKPOINT}/"):
        assert f"`{name}`" in TEXT, name
    assert model_card.__doc__


def test_the_sources_in_the_docs_of_labelled_data_are_a_jobs() -> None:
    block = re.search(r"```yaml\n(.*?)```", (ROOT / "docs/training-data.md").read_text(), re.DOTALL)
    assert block is not None
    assert len(build_job(TrainDistanceMapJob, {"out": "o", "model": "vits16", **yaml.safe_load(block[1])}).train) == 2


def test_its_job_and_the_example_are_jobs() -> None:
    block = re.search(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    assert block is not None
    assert build_job(TrainDistanceMapJob, yaml.safe_load(block[1])).steps == 10_000
    values = read_job_file(ROOT / "jobs/configs/train_distance_map.yaml", ["out=x"], TrainDistanceMapJob)
    example = build_job(TrainDistanceMapJob, values)
    assert example.model == "vits16" and example.out == "x"


def test_the_job_of_volumes_and_its_example_are_jobs() -> None:
    block = re.search(r"```yaml\n(.*?)```", VOLUMES, re.DOTALL)
    assert block is not None
    assert build_job(TrainContextFusionJob, yaml.safe_load(block[1])).target == "affinities"
    values = read_job_file(ROOT / "jobs/configs/train_context_fusion.yaml", ["out=x"], TrainContextFusionJob)
    assert build_job(TrainContextFusionJob, values).out == "x"


if __name__ == "__main__":
    for table in [*TABLES, *VOLUME_TABLES]:
        print("\n".join(["| field | default | meaning |", "|---|---|---|", *table, ""]))
