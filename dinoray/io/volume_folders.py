"""What lies in a container of arrays: the names in a group, and paths that are those of labels."""

from __future__ import annotations

from dinoray.io.stores import is_local
from dinoray.io.volume_source import VolumeRequest, labels_error
from dinoray.io.walk import LocalTree, RemoteTree

CONTAINERS = (".zarr", ".n5")


def folders(uri: str) -> list[str]:
    """The names of the folders in a group, none when it is not there. Raises OSError of storage."""
    tree: LocalTree | RemoteTree = LocalTree() if is_local(uri) else RemoteTree(uri)
    try:
        entries = tree.list(uri if isinstance(tree, LocalTree) else tree.path)
    except FileNotFoundError:
        return []
    return [entry.name for entry in entries if entry.is_folder and not entry.name.startswith(".")]


def refuse_labels_path(uri: str, request: VolumeRequest) -> None:
    """A path below `labels/` of a container is a label image, whatever its metadata leave out."""
    dataset, parts = request.dataset, uri.split("/")
    inside = next((parts[i + 1:] for i, part in enumerate(parts) if part.lower().endswith(CONTAINERS)), [])
    if not request.mask and "labels" in [*inside, *(dataset or "").split("/")]:
        raise labels_error("a path below labels/", f"{uri}/{dataset}" if dataset else uri)


def choices(uri: str, top: str | None = None) -> str:
    """What to do when a group holds no volume by itself: the names in it. Raises OSError of storage."""
    prefix = uri[len(top) + 1:] + "/" if top and uri.startswith(top + "/") else ""
    names = [prefix + name for name in folders(uri)]
    return f"choose an array with --dataset; there are: {', '.join(names[:20])}" if names else "check the path"
