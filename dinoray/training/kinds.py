"""What differs between kinds of trainings, for the driver (dinoray.train): what is listed, looked at, built and said.

The steps themselves are a worker's (dinoray.training.spec), the loop is every kind's (dinoray.training.loop).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from dinoray.config import TrainingJob
from dinoray.errors import BadRequest
from dinoray.io.items import FileRef
from dinoray.io.stores import Store
from dinoray.vision.backbone import Backbone

Say = Callable[[str], None]


class Listed(Protocol):
    """An image or a volume of a set, as the listing saw it."""

    image_id: str
    files: tuple[FileRef, ...]
    source: int


Sets = dict[str, Sequence[Any]]
"""`train`, `validation` -> what is Listed of them."""


class TrainingKind(Protocol):
    """One kind of training."""

    def settled(self, job: Any) -> Any:
        """The job with what is this kind's to decide. Raises BadRequest for what cannot be trained."""
        ...

    def sets(self, job: Any) -> Sets:
        """What is trained on and validated on. Raises BadRequest."""
        ...

    def digest(self, listed: Sequence[Any]) -> str:
        """Of a set: the same when nothing changed."""
        ...

    def probe(self, job: Any, sets: Sets) -> tuple[Backbone | None, int]:
        """(the backbone on the CPU, if there is one; how many parameters learn). Raises BadRequest, WeightsError."""
        ...

    def notes(self, job: Any, sets: Sets) -> list[str]:
        """What is allowed and hardly meant, and what the user should know before the first step."""
        ...

    def survey(self, job: Any, store: Store, sets: Sets, say: Say, check: Callable[[], None]) -> None:
        """Look at what has not been looked at yet. Raises BadRequest for sets that cannot be trained on."""
        ...

    def same_content(self, job: Any, store: Store, sets: Sets, say: Say) -> bool:
        """Whether files that were moved, copied or touched hold what the training was begun on."""
        ...

    def closing(self, config: dict[str, Any]) -> list[str]:
        """Lines before the last one; `config` is the checkpoint's config.json."""
        ...

    def usage(self, checkpoint: str) -> str:
        """The command that uses a checkpoint (quoted already)."""
        ...


def kind_of(job: TrainingJob) -> TrainingKind:
    """The kind of a job. Raises BadRequest for one that is not known here."""
    if job.kind == "distance-map":
        from dinoray.training.distance_kind import DistanceMapKind

        return DistanceMapKind()
    if job.kind == "context-fusion":
        from dinoray.training.fusion_kind import ContextFusionKind

        return ContextFusionKind()
    raise BadRequest(f"no training is called {job.kind!r}", todo="use distance-map or context-fusion")
