"""`deltafold zoo`: what comes into a folder of deltas, what goes, and under which names."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Literal, cast

import click

from deltafold.compress.sizes import human
from deltafold.server.cli.output import Output, output_options, quiet_option, table

if TYPE_CHECKING:
    from deltafold.compress.zoo_gc import Collected
    from deltafold.compress.zoo_list import Listing, Member


@click.group("zoo")
def zoo() -> None:
    """Look after a zoo: a folder of deltas that one server serves.

    A server sees every change at its next request; running requests finish on what they began with.

    \b
    deltafold zoo add zoo ./sql-v2
    deltafold zoo alias zoo prod sql-v2
    deltafold zoo list zoo
    """


@zoo.command("add", short_help="Put a delta into a zoo.")
@click.argument("zoo_folder", metavar="ZOO")
@click.argument("delta")
@click.option("--name", help="The variant's name; the folder's or repo's if left out.")
@click.option("--copy", "how", flag_value="copy", default=True, help="Copy it (the default).")
@click.option("--move", "how", flag_value="move", help="Move it: the folder is gone afterwards.")
@click.option("--link", "how", flag_value="link", help="Leave it where it is, and link to it.")
@click.option("--overwrite", is_flag=True, help="Replace the variant of that name.")
@quiet_option
@output_options
@click.pass_obj
def add(
    output: Output, zoo_folder: str, delta: str, name: str | None, how: str, overwrite: bool
) -> None:
    """Put DELTA, a folder or hub id, into ZOO, which is made if there is none.

    It is verified before it stands there. All deltas of a zoo have one base.

    \b
    deltafold zoo add zoo ./sql-v2
    deltafold zoo add zoo org/sql-delta --name sql
    """
    from deltafold.compress.zoo_add import add_delta

    with output.progress() as progress:
        added = add_delta(
            zoo_folder,
            delta,
            name=name,
            how=cast(Literal["copy", "link", "move"], how),
            overwrite=overwrite,
            progress=progress,
        )
    data = {
        "name": added.name,
        "path": str(added.folder),
        "delta_id": added.delta_id,
        "bytes": added.bytes,
    }
    output.result(data, f"{added.folder}: verified and added, {human(added.bytes)}")


@zoo.command("list", short_help="List the deltas, LoRAs and aliases of a zoo.")
@click.argument("zoo_folder", metavar="ZOO")
@output_options
@click.pass_obj
def list_(output: Output, zoo_folder: str) -> None:
    """List the deltas, LoRAs and aliases of ZOO.

    \b
    deltafold zoo list zoo
    """
    from deltafold.compress.zoo_list import list_zoo

    listing = list_zoo(zoo_folder)
    data = {
        "path": str(listing.folder),
        "variants": [_member(m) for m in listing.members],
        "dangling_aliases": listing.dangling,
        "families_bytes": listing.families_bytes,
        "disk_bytes": listing.disk_bytes,
    }
    output.result(data, _list_text(listing, output))


def _member(member: Member) -> dict[str, Any]:
    data = {
        "name": member.name,
        "kind": member.kind,
        "aliases": list(member.aliases),
        "delta_id": member.delta_id,
        "codec": member.codec,
        "base": {"name": member.base, "fingerprint": member.fingerprint},
        "bytes": member.bytes,
        "ratio": member.ratio,
        "linked": member.linked,
        "ok": member.error is None,
    }
    return data if member.error is None else {**data, "error": member.error.to_json()}


def _list_text(listing: Listing, output: Output) -> str:
    text = f"{listing.folder}: {len(listing.members)} variants, {human(listing.disk_bytes)} on disk"
    if listing.families_bytes:
        text += f", {human(listing.families_bytes)} of it shared by families"
    rows = [
        [
            m.name,
            ", ".join(m.aliases) or "-",
            m.delta_id[7:15] or "-",
            human(m.bytes),
            "-" if m.ratio is None else f"{m.ratio:.2%}",
            m.codec,
            m.base + (f"  ({m.fingerprint[7:15]})" if m.fingerprint else ""),
        ]
        for m in listing.members
        if m.error is None
    ]
    if rows:
        head = ["name", "aliases", "id", "size", "ratio", "codec", "base"]
        text += "\n" + table(head, rows, "size ratio")
    for member in listing.members:
        if member.linked:
            text += f"\n{member.name} is a link to {member.linked}"
        if member.error is not None:
            code = output.style(f"error[{member.error.code}]", fg="red")
            text += f"\n{member.name}  {code}: {member.error.message}"
    for alias, digest in listing.dangling.items():
        text += f"\n{output.style(alias, fg='red')}  stands for {digest[:23]}..., which is not here"
    return text


@zoo.command("rm", short_help="Take a variant out of a zoo.")
@click.argument("zoo_folder", metavar="ZOO")
@click.argument("name")
@click.option("--force", is_flag=True, help="Also if an alias stands for it; the alias goes too.")
@output_options
@click.pass_obj
def rm(output: Output, zoo_folder: str, name: str, force: bool) -> None:
    """Take the variant NAME out of ZOO. What was only linked stays where it is.

    \b
    deltafold zoo rm zoo sql-v1
    """
    from deltafold.compress.zoo_add import remove_variant

    removed = remove_variant(zoo_folder, name, force=force)
    text = f"{name}: removed"
    if removed.aliases:
        text += f", and with it the aliases {', '.join(removed.aliases)}"
    output.result({"name": name, "aliases": list(removed.aliases)}, text)


@zoo.command("alias", short_help="Let a name stand for a delta.")
@click.argument("zoo_folder", metavar="ZOO")
@click.argument("alias_name", metavar="ALIAS")
@click.argument("name", required=False)
@click.option("--rm", "remove", is_flag=True, help="Forget ALIAS.")
@output_options
@click.pass_obj
def alias(output: Output, zoo_folder: str, alias_name: str, name: str | None, remove: bool) -> None:
    """Let ALIAS stand for the delta NAME of ZOO (or for what another alias stands for).

    It stands for the delta's digest: another delta that takes the place of NAME later is not meant.

    \b
    deltafold zoo alias zoo prod sql-v2
    deltafold zoo alias zoo prod --rm
    """
    from deltafold.compress.zoo_aliases import remove_alias, set_alias

    if (name is None) != remove:
        raise click.UsageError("give the NAME that ALIAS is to stand for, or --rm.")
    if name is None:
        remove_alias(zoo_folder, alias_name)
        output.result({"alias": alias_name, "delta_id": None}, f"{alias_name}: forgotten")
        return
    digest = set_alias(zoo_folder, alias_name, name)
    output.result(
        {"alias": alias_name, "delta_id": digest}, f"{alias_name}: {name}  ({digest[:23]}...)"
    )


@zoo.command("gc", short_help="Remove leftovers, and store equal tensors once.")
@click.argument("zoo_folder", metavar="ZOO")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and change nothing.")
@click.option(
    "--unfinished",
    is_flag=True,
    help="Also remove NAME.partial of runs that the same command would finish.",
)
@click.option(
    "--min-bytes",
    type=click.IntRange(min=1),
    default=65536,
    show_default=True,
    help="Least bytes that deltas must have in common to share them.",
)
@quiet_option
@output_options
@click.pass_obj
def gc(output: Output, zoo_folder: str, dry_run: bool, unfinished: bool, min_bytes: int) -> None:
    """Remove leftovers from ZOO, and store tensors that are equal between its deltas once.

    Each delta stays whole: equal files have one place on disk and a name in each folder. A run that
    is cut off leaves everything readable.

    \b
    deltafold zoo gc zoo --dry-run
    """
    from deltafold.compress.zoo_gc import collect

    with output.progress() as progress:
        done = collect(
            zoo_folder,
            dry_run=dry_run,
            unfinished=unfinished,
            min_bytes=min_bytes,
            progress=progress,
        )
    data = {
        "dry_run": dry_run,
        "freed": done.freed,
        "disk_bytes": done.after,
        "leftovers": [
            {"path": str(x.path), "why": x.why, "bytes": x.bytes} for x in done.leftovers
        ],
        "recovered": list(done.recovered),
        "shared": {deltas: list(tensors) for deltas, tensors in done.shared.items()},
        "skipped": dict(done.skipped),
        "unfinished": [str(path) for path in done.unfinished],
    }
    output.result(data, _gc_text(zoo_folder, done))


def _gc_text(folder: str, done: Collected) -> str:
    freed = f"{'would free about' if done.dry_run else 'freed'} {human(max(done.freed, 0))}"
    lines = [f"{folder}: {freed}, {human(done.after)} on disk"]
    lines += [f"  {x.path}: {x.why}, {human(x.bytes)}" for x in done.leftovers]
    lines += [f"  {name}: put back" for name in done.recovered]
    lines += [f"  {deltas}: {len(t)} tensors stored once" for deltas, t in done.shared.items()]
    lines += [f"  {name} shares nothing: {why}" for name, why in done.skipped.items()]
    lines += [
        f"  {path}: kept, the command that began it goes on there (--unfinished removes it)"
        for path in done.unfinished
    ]
    return "\n".join(lines)


@zoo.command("verify", short_help="Check every variant and alias of a zoo.")
@click.argument("zoo_folder", metavar="ZOO")
@click.option("--base", help="Also check that this is their base and that no tensor is missing.")
@click.option("--full", is_flag=True, help="Also rebuild what is stored exactly; needs --base.")
@quiet_option
@output_options
@click.pass_obj
def verify(output: Output, zoo_folder: str, base: str | None, full: bool) -> None:
    """Check every variant and alias of ZOO; ends with status 3 if anything is wrong.

    \b
    deltafold zoo verify zoo --base Llama-3.1-8B
    """
    from deltafold.compress.zoo_list import verify_zoo

    began = time.monotonic()
    with output.progress() as progress:
        found = list(verify_zoo(zoo_folder, base=base, full=full, progress=progress))
    bad = [c for c in found if c.error is not None]
    data = {
        "ok": not bad,
        "base_checked": base is not None,
        "variants": [
            {
                "name": c.name,
                "kind": c.kind,
                "ok": c.error is None,
                **({} if c.error is None else {"error": c.error.to_json()}),
            }
            for c in found
        ],
        "seconds": round(time.monotonic() - began, 3),
    }
    rows = [[c.name, c.kind, "ok" if c.error is None else c.error.code] for c in found]
    text = table(["name", "kind", "outcome"], rows) if rows else f"{zoo_folder} holds no variant"
    for checked in bad:
        text += f"\n\n{checked.name}\n{checked.error}"
    output.result(data, text)
    if bad:
        click.get_current_context().exit(3)
