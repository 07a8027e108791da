"""Where the words for a model or an adapter lead: a directory of this machine."""

from __future__ import annotations

from pathlib import Path

from peftsurgery.errors import CheckpointError


def locate(model: str | Path) -> Path:
    """The directory that `model` names: itself, or the snapshot of a hub id that is in the local cache.

    Raises:
        CheckpointError: it is neither; nothing is ever downloaded.
    """
    path = Path(model).expanduser()
    return path if path.is_dir() else _cached(str(model))


def _cached(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, local_files_only=True))
    except HFValidationError:
        raise CheckpointError(f"{model!r} is not a directory. Check the path.") from None
    except LocalEntryNotFoundError:
        raise CheckpointError(
            f"{model!r} is neither a directory nor a model in the local cache. "
            f"Check the path, or fetch it first: `hf download {model}`."
        ) from None
