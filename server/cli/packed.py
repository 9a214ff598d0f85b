"""What packing gave, for people and for programs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from deltafold.compress.sizes import human
from deltafold.server.cli.budget import plan_text
from deltafold.server.cli.output import facts

if TYPE_CHECKING:
    from deltafold.compress import Manifest, PackReport


def pack_data(report: PackReport, seconds: float) -> dict[str, Any]:
    """A packing run's outcome for programs."""
    from deltafold.compress.memory import peak_memory

    manifest, totals = report.manifest, report.manifest.totals
    return {
        "out": str(report.out),
        "delta_id": manifest.delta_id,
        "bytes": totals.delta_bytes,
        "variant_bytes": totals.variant_bytes,
        "ratio": totals.ratio,
        "coverage": totals.coverage,
        "counts": {
            "coded": len(manifest.tensors),
            "unchanged": len(manifest.unchanged),
            "absent": len(manifest.absent),
        },
        "accepted": list(manifest.accepted),
        "recipe": manifest.recipe,
        "base": manifest.base.model_dump(),
        "base_quantization": quantization_data(manifest),
        "base_names": names_data(manifest),
        "untied": manifest.untied,
        "plan": report.plan.to_json() if report.plan else None,
        "quality": manifest.quality,
        "resumed": report.resumed,
        "device": report.device,
        "tensors_on_device": report.on_device,
        "worst": [{"tensor": name, "rel_error": error} for name, error in report.worst()],
        "seconds": round(seconds, 3),
        "peak_memory_bytes": peak_memory(),
    }


def pack_text(report: PackReport, seconds: float) -> str:
    """A packing run's outcome for people."""
    from deltafold.server.cli.bar import peak_memory_text

    manifest, totals = report.manifest, report.manifest.totals
    counts = f"{len(manifest.tensors)} coded, {len(manifest.unchanged)} equal to the base's"
    if manifest.absent:
        counts += f", {len(manifest.absent)} absent"
    if report.resumed:
        counts += f"; {report.resumed} were done by the run before"
    lines = [
        (
            "size",
            f"{human(totals.delta_bytes)}, {totals.ratio:.2%} of {human(totals.variant_bytes)}",
        ),
        ("tensors", counts),
        ("codec", manifest.codec_summary()),
        ("base", f"{manifest.base.name}  ({manifest.base.fingerprint[:23]}...)"),
    ]
    if report.device != "cpu":
        lines.append(("device", _device_text(report)))
    quantization = quantization_data(manifest)
    if quantization:
        lines.append(("against", against_text(quantization)))
    if manifest.base_names is not None:
        lines.append(("names", manifest.base_names.text()))
    if manifest.untied:
        lines.append(("unties", untied_text(manifest.untied)))
    worst = report.worst(1)
    if worst and worst[0][1] > 0:
        lines.append(("largest error", f"{worst[0][1]:.3f} of its delta, {worst[0][0]}"))
    elif manifest.tensors:
        lines.append(("largest error", "0: every tensor comes back bit for bit"))
    if "kl_mean" in manifest.quality:
        figures = manifest.quality
        agreed = f"{figures['top1_agreement']:.2%} same likeliest token"
        lines.append(("KL", f"{figures['kl_mean']:.4g} nats a token; {agreed}"))
    if "fit" in manifest.quality:
        found = manifest.quality["fit"]
        before, after = found["kl"]
        kept = "" if found["kept"] == "fitted" else "; no better, so the first scales were kept"
        lines.append(("fitted", f"KL {before:.4g} before, {after:.4g} after, nats a token{kept}"))
    if manifest.accepted:
        lines.append(("accepted", ", ".join(manifest.accepted)))
    lines.append(("took", f"{seconds:.1f} s, peak memory {peak_memory_text()}"))
    text = f"{report.out}: written and verified\n{facts(lines)}"
    return text if report.plan is None else f"{text}\n\nplan\n{plan_text(report.plan)}"


def quantization_data(manifest: Manifest) -> dict[str, Any] | None:
    """What a delta's base must run as, for programs; None where that is free."""
    quantization = manifest.base_quantization
    return None if quantization is None else quantization.model_dump(mode="json")


def names_data(manifest: Manifest) -> dict[str, str] | None:
    """How the fine-tune calls the base's tensors, for programs; None where it calls them the same."""
    scheme = manifest.base_names
    return None if scheme is None else scheme.model_dump(mode="json")


def untied_text(untied: Mapping[str, str]) -> str:
    """What the fine-tune has of its own that is one tensor in the base."""
    pairs = ", ".join(f"{name} from {tied}" for name, tied in untied.items())
    return f"{pairs}: both are stored"


def against_text(quantization: Mapping[str, Any]) -> str:
    """What a delta was taken against, where it is not the base itself."""
    count = len(quantization["tensors"])
    return f"the base dequantised from {quantization['method']} ({count} tensors)"


def _device_text(report: PackReport) -> str:
    if not report.on_device:
        return f"{report.device} coded nothing: the codecs of this recipe run on the CPU"
    rest = len(report.manifest.tensors) - report.on_device
    return f"{report.on_device} coded on {report.device}, {rest} on the CPU"
