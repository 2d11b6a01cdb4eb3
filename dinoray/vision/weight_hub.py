"""From what a user names to files on this machine: a path, a hub id, or a model's official weights.

`--model vits16` alone means Meta's weights and nothing else: the Hugging Face copy when it is cached or an
access token is at hand, or timm's open mirror of the same weights after the licence was accepted. When none
of these can be had the answer is a WeightsError that says what to do; another model is never substituted.
No message, cause or context of an error holds the access token.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from dinoray.errors import WeightsError
from dinoray.vision import weight_files
from dinoray.vision.weight_files import WeightFiles

HUGGING_FACE_IDS = {
    name: f"facebook/dinov3-{name}-pretrain-lvd1689m"
    for name in ("vits16", "vits16plus", "vitb16", "vitl16", "vith16plus", "vit7b16")
}
# _qkvb mirrors keep the q and v biases; the 7B has none
TIMM_IDS = {
    "vits16": "timm/vit_small_patch16_dinov3_qkvb.lvd1689m",
    "vits16plus": "timm/vit_small_plus_patch16_dinov3_qkvb.lvd1689m",
    "vitb16": "timm/vit_base_patch16_dinov3_qkvb.lvd1689m",
    "vitl16": "timm/vit_large_patch16_dinov3_qkvb.lvd1689m",
    "vith16plus": "timm/vit_huge_plus_patch16_dinov3_qkvb.lvd1689m",
    "vit7b16": "timm/vit_7b_patch16_dinov3.lvd1689m",
}
_FILES = ["*.safetensors", "*.safetensors.index.json", "config.json", "preprocessor_config.json"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve(
    model: str | None, weights: str | os.PathLike | None, *, accept_license: bool = False
) -> WeightFiles:
    """The files of `weights` (a file, a folder or a hub id), or of the official weights of `model`.

    `accept_license` stands for the user's acceptance of the DINOv3 License (--accept-dinov3-license).
    Raises WeightsError: not found, gated, unreachable, or nothing official exists.
    """
    if weights is None:
        if model is None:
            raise WeightsError("neither a model nor weights were named", todo="give model (--model) or weights (--weights)")
        return _official(model, accept_license)
    text = os.fspath(weights)
    path = Path(text).expanduser()
    if path.exists():
        return weight_files.find(path)
    if _HUB_ID.fullmatch(text) and path.suffix not in (".safetensors", *weight_files.TORCH_SUFFIXES):
        return _from_hub(text)
    raise WeightsError(
        "no such file or folder, and not a hub id", where=f"weights (--weights) {redact(text)}", todo="check the path"
    )


def _official(model: str, accept_license: bool) -> WeightFiles:
    if model not in HUGGING_FACE_IDS:
        raise WeightsError(
            f"nobody publishes DINOv3 weights for {model}",
            where="model (--model)",
            todo=f"give weights (--weights FILE), or choose one of {', '.join(HUGGING_FACE_IDS)}",
        )
    gated, mirror = HUGGING_FACE_IDS[model], TIMM_IDS[model]
    cached = _cached(gated) or (accept_license and _cached(mirror))
    if cached:
        return cached
    if accept_license:  # the mirror holds the same weights, and a token may still be waiting for access
        return _from_hub(mirror)
    if _token():
        return _from_hub(gated)
    raise WeightsError(
        f"the official weights of {model} are not on this machine and are gated",
        where=f"https://huggingface.co/{gated}",
        todo=_ways(gated),
    )


def _ways(hub_id: str) -> str:
    lines = [
        f"accept the licence at https://huggingface.co/{hub_id} and set HF_TOKEN to a token of that account",
        "or give weights (--weights FILE) that you already have",
    ]
    if hub_id in HUGGING_FACE_IDS.values():
        lines.append(
            "or give accept_dinov3_license (--accept-dinov3-license) to accept the DINOv3 License and use timm's "
            "open mirror"
        )
    return "; ".join(lines)


def _cached(hub_id: str) -> WeightFiles | None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = huggingface_hub.snapshot_download(hub_id, allow_patterns=_FILES, local_files_only=True)
    except LocalEntryNotFoundError:
        return None
    try:
        return weight_files.find(Path(folder), source=hub_id, hub_id=hub_id)
    except WeightsError:
        return None  # an interrupted download: let the download go on instead


def _from_hub(hub_id: str) -> WeightFiles:
    import huggingface_hub

    refusal = None
    try:
        folder = huggingface_hub.snapshot_download(hub_id, allow_patterns=_FILES)
    except Exception as error:  # every kind is reported below, without the original, which may hold the token
        refusal = _explain(hub_id, error)
    if refusal is not None:
        raise refusal
    return weight_files.find(Path(folder), source=hub_id, hub_id=hub_id)


def _explain(hub_id: str, error: Exception) -> WeightsError:
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    where = f"https://huggingface.co/{hub_id}"
    if isinstance(error, errors.GatedRepoError) or status == 403:
        what = f"access to {hub_id} is gated and " + (
            "the account of your token has not been given access" if _token() else "no access token is set"
        )
        return WeightsError(what, where=where, todo=_ways(hub_id))
    if isinstance(error, (errors.RepositoryNotFoundError, errors.EntryNotFoundError)) and not isinstance(
        error, errors.LocalEntryNotFoundError
    ):
        return WeightsError(
            f"the hub has no model {hub_id}, or hides it from you",
            where=where,
            todo="check the id's spelling",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return WeightsError(
            f"{hub_id} holds no published version", where=where, todo="check the id's spelling"
        )
    if status == 401:
        return WeightsError("the hub does not accept your access token", where=where, todo=_ways(hub_id))
    if isinstance(error, errors.OfflineModeIsEnabled) or _offline():
        what, todo = "HF_HUB_OFFLINE is set and the weights are not cached", "unset HF_HUB_OFFLINE"
    elif isinstance(error, (errors.LocalEntryNotFoundError, OSError)) or _is_network(error):
        answer = f" (it answered {status})" if status else ""
        what, todo = f"the hub could not be reached{answer}", "check the network and try again"
    else:
        what, todo = "the download failed", "try again"
    detail = redact(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}")
    return WeightsError(
        f"{what}: {detail}", where=where, todo=f"{todo}, or give weights (--weights FILE) on this machine"
    )


def _is_network(error: Exception) -> bool:
    # huggingface_hub changed its HTTP library twice; their base classes are not part of its interface
    return type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "requests", "urllib3")


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _token() -> str | None:
    import huggingface_hub

    return huggingface_hub.get_token()


def redact(text: str) -> str:
    """`text` without any access token: those set here, and whatever looks like one of Hugging Face."""
    known = [os.environ.get("HF_TOKEN"), os.environ.get("HUGGING_FACE_HUB_TOKEN"), _token()]
    for secret in filter(None, (k.strip() for k in known if k)):
        text = text.replace(secret, "***")
    return re.sub(r"hf_[A-Za-z0-9]{8,}", "***", text)
