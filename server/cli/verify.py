"""`deltafold verify`: whether a delta is whole, and fits its base."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from deltafold.server.cli.output import Output, output_options, quiet_option

if TYPE_CHECKING:
    from deltafold.compress import VerifyReport


@click.command("verify")
@click.argument("delta")
@click.option("--base", help="Also check that this is its base and that no tensor is missing.")
@click.option("--full", is_flag=True, help="Also rebuild what is stored exactly; needs --base.")
@quiet_option
@output_options
@click.pass_obj
def verify(output: Output, delta: str, base: str | None, full: bool) -> None:
    """Check DELTA; ends with status 3 if anything is wrong.

    \b
    deltafold verify zoo/sql
    deltafold verify zoo/sql --base Llama-3.1-8B --full
    """
    from deltafold.compress import verify_delta

    began = time.monotonic()
    with output.progress() as progress:
        report = verify_delta(delta, base=base, full=full, progress=progress)
    data = {
        "ok": True,
        "delta": delta,
        "delta_id": report.delta_id,
        "tensors": report.tensors,
        "coded": report.coded,
        "base_checked": report.base_checked,
        "restored": report.restored,
        "seconds": round(time.monotonic() - began, 3),
    }
    output.result(data, f"{delta}: {output.style('ok', fg='green')}\n{_text(report, full)}")


def _text(report: VerifyReport, full: bool) -> str:
    lines = [f"  {report.coded} payloads match their checksums"]
    if report.base_checked:
        lines.append(f"  the base is its own, and all {report.tensors} tensors are accounted for")
    else:
        lines.append("  the base was not checked: give --base BASE")
    if full:
        lossy = report.coded - report.restored
        kept = f"  {report.restored} tensors were rebuilt and are the fine-tune's, bit for bit"
        lines.append(f"{kept}; {lossy} are lossy" if lossy else kept)
    return "\n".join(lines)
