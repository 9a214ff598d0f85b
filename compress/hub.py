"""A reference to a model as users write it: a folder, `org/name`, `org/name@revision`, `hf://...`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from deltafold.compress.errors import DeltafoldError

#: What a checkpoint or delta repo consists of; weights of other formats are not fetched.
PATTERNS = (
    *("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.spm", "*.bpe"),
    *("*.md", "*.csv", "*.svg", "LICENSE*", "NOTICE*"),
)


@dataclass(frozen=True, slots=True)
class Reference:
    """A resolved reference: the local folder, and the hub's name and revision where there is one."""

    folder: Path
    name: str
    revision: str | None = None


def resolve(reference: str | Path) -> Reference:
    """Find or download what a user named.

    Raises:
        DeltafoldError: `not-found` with the reason; `missing-extra` where a hub id is given without
            huggingface_hub installed.
    """
    text = str(reference)
    folder = Path(text).expanduser()
    if folder.is_dir():
        return Reference(folder, folder.resolve().name)
    if text.startswith("hf://"):
        return download(text)
    if text.startswith(("/", ".", "~")) or text.count("/") != 1 or folder.exists():
        raise DeltafoldError(
            "not-found",
            f"{text} is not a folder.",
            fix="give the folder of a checkpoint, or a hub id such as org/name or org/name@revision",
        )
    return download(text)


def download(reference: str, revision: str | None = None) -> Reference:
    """Fetch `[hf://]org/name[@revision]` from the hub into its cache.

    Raises:
        DeltafoldError: `not-found` with the reason; `missing-extra` without huggingface_hub.
    """
    repo, _, named = reference.removeprefix("hf://").partition("@")
    revision = revision or named or None
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise DeltafoldError(
            "missing-extra",
            f"{repo} is a hub id, and huggingface_hub is not installed.",
            fix="pip install 'deltafold[hf]', or give a local folder",
        ) from error
    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=list(PATTERNS)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise DeltafoldError(
            "not-found",
            f"{repo} is neither a local folder nor could it be fetched from the hub.",
            facts=[("reason", str(error).splitlines()[0] if str(error) else type(error).__name__)],
            fix="check the name, the network and HF_TOKEN, or give a local folder",
        ) from error
    # A snapshot's folder is named after its commit.
    return Reference(folder, repo, folder.name)
