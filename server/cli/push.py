"""`deltafold push`: a delta to the hub."""

from __future__ import annotations

import click

from deltafold.compress.sizes import human
from deltafold.server.cli.output import Output, output_options, quiet_option, table


@click.command("push")
@click.argument("delta")
@click.argument("repo_id", metavar="ORG/NAME")
@click.option("--private", is_flag=True, help="If the repo has to be made, make it private.")
@click.option("--revision", help="A branch, made if there is none; the main one if left out.")
@click.option("--dry-run", is_flag=True, help="Verify and list the files, and send nothing.")
@quiet_option
@output_options
@click.pass_obj
def push(
    output: Output, delta: str, repo_id: str, private: bool, revision: str | None, dry_run: bool
) -> None:
    """Verify DELTA and upload its files, and no others, to ORG/NAME in one commit.

    A delta that does not verify is not sent. huggingface_hub does the rest: HF_TOKEN must be allowed
    to write.

    \b
    deltafold push zoo/sql org/sql-delta --private
    """
    from deltafold.compress.hub_delta import push as send

    with output.progress() as progress:
        sent = send(
            delta, repo_id, private=private, revision=revision, dry_run=dry_run, progress=progress
        )
    total = sum(sent.files.values())
    data = {
        "repo_id": sent.repo_id,
        "delta_id": sent.delta_id,
        "dry_run": dry_run,
        "url": sent.url,
        "files": sent.files,
        "bytes": total,
    }
    if dry_run:
        rows = [[name, f"{nbytes:,}"] for name, nbytes in sent.files.items()]
        text = f"{delta} would go to {repo_id}, {human(total)}\n"
        text += table(["file", "bytes"], rows, "bytes")
    else:
        text = f"{delta}: verified and sent to {repo_id}, {human(total)}\n  {sent.url}"
    output.result(data, text)
