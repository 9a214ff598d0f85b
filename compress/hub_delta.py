"""Deltas on the hub: fetching one and sending one, verified on the way."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltafold.compress.delta_files import copy_delta, delta_files
from deltafold.compress.errors import DeltafoldError
from deltafold.compress.hub import download
from deltafold.compress.progress import OnProgress, ignore
from deltafold.compress.repo import DeltaRepo
from deltafold.compress.staging import Staging
from deltafold.compress.verify import check_payload
from deltafold.compress.zoo_add import Added, add_delta
from deltafold.compress.zoo_folder import FAMILIES_NAME, families_named, families_of


def pull(
    reference: str,
    out: str | Path | None = None,
    *,
    zoo: str | Path | None = None,
    name: str | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    progress: OnProgress = ignore,
) -> Added:
    """Fetch a delta from the hub and verify it; it stands at its place whole or not at all.

    Args:
        reference: `org/name` or `org/name@revision`.
        out: the folder to write; the repo's name, in the working directory, if None.
        zoo: put it into this zoo instead.
        name: its name there; the repo's if None.
        revision: branch, tag or commit.
        overwrite: replace what has the name.
        progress: called after every tensor that was checked.

    Raises:
        DeltafoldError: `not-found`, `missing-extra`, `not-a-delta`, `exists`, or what is wrong with it.
    """
    _check_id(reference.removeprefix("hf://").partition("@")[0])
    fetched = download(reference, revision)
    if zoo is not None:
        return add_delta(zoo, fetched, name=name, overwrite=overwrite, progress=progress)
    place = Path(out) if out is not None else Path(fetched.name.rpartition("/")[2])
    # Before anything is written: what is no delta, or a broken one, never gets a folder.
    check_payload(DeltaRepo.open(fetched), progress)
    with Staging(place, overwrite=overwrite, inputs=(fetched.folder,)) as staging:
        copy_delta(fetched.folder, staging.folder)
        for family in families_named(fetched.folder, families_of(fetched.folder)):
            shutil.copytree(family, staging.folder / FAMILIES_NAME / family.name)
        repo = DeltaRepo.open(staging.folder)
        check_payload(repo)
        staging.publish()
    return Added(place.name, place, repo.digest, repo.manifest.totals.delta_bytes)


@dataclass(frozen=True)
class Pushed:
    """What was sent, or with `dry_run` would be.

    Attributes:
        repo_id: where to.
        delta_id: content digest.
        files: bytes by name.
        url: of the commit; empty with `dry_run`.
    """

    repo_id: str
    delta_id: str
    files: dict[str, int]
    url: str = ""


def push(
    delta: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
    progress: OnProgress = ignore,
) -> Pushed:
    """Verify a delta and upload it, in one commit; the repo is made if there is none.

    Only the delta's own files are sent, with what it shares with others, if it does.

    Args:
        delta: its folder.
        repo_id: `org/name`.
        private: a repo that is made is private.
        revision: a branch, made if there is none; the main one if None.
        dry_run: verify and list only.
        progress: called after every tensor that was checked.

    Raises:
        DeltafoldError: what is wrong with the delta; `not-found` where the hub cannot be reached or
            refuses; `missing-extra`; `bad-argument`.
    """
    folder = Path(delta).expanduser()
    _check_id(repo_id)
    if not folder.is_dir():
        raise DeltafoldError("not-found", f"{folder} is not a folder.", fix="give a delta's folder")
    repo = DeltaRepo.open(folder)
    check_payload(repo, progress)
    paths = {name: folder / name for name in delta_files(folder)}
    beside = [*families_of(folder), *families_of(folder.resolve().parent)]
    for family in families_named(folder, beside):
        for path in sorted(p for p in family.rglob("*") if p.is_file()):
            within = path.relative_to(family).as_posix()
            paths.setdefault(f"{FAMILIES_NAME}/{family.name}/{within}", path)
    files = {name: path.stat().st_size for name, path in sorted(paths.items())}
    url = "" if dry_run else _upload(paths, repo_id, private, revision, repo.digest)
    return Pushed(repo_id, repo.digest, files, url)


def _upload(
    paths: dict[str, Path], repo_id: str, private: bool, revision: str | None, digest: str
) -> str:
    with _hub(repo_id) as hub:
        api = hub.HfApi(library_name="deltafold")
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        done = api.create_commit(
            repo_id,
            [hub.CommitOperationAdd(name, path) for name, path in sorted(paths.items())],
            commit_message=f"Upload a delta ({digest[:23]}...)",
            revision=revision,
        )
        return str(done.commit_url)


@contextmanager
def _hub(repo_id: str) -> Iterator[Any]:
    """huggingface_hub, its failures told as ours."""
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    except ImportError as error:
        raise DeltafoldError(
            "missing-extra",
            "uploading needs huggingface_hub, which is not installed.",
            fix="pip install 'deltafold[hf]'",
        ) from error
    try:
        yield huggingface_hub
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        raise DeltafoldError(
            "not-found",
            f"the hub did not take {repo_id}.",
            facts=[("reason", str(error).splitlines()[0] if str(error) else type(error).__name__)],
            fix="check the name, the network, HF_TOKEN (it must be allowed to write) and "
            "HF_HUB_OFFLINE",
        ) from error


def _check_id(repo_id: str) -> None:
    if repo_id.count("/") != 1 or repo_id.startswith((".", "/", "~")) or repo_id.endswith("/"):
        raise DeltafoldError("bad-argument", f"{repo_id!r} is no hub id.", fix="give ORG/NAME")
