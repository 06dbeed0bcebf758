"""How a plan looks: the table of stages and the projected memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from relex_stream.wording import format_bytes, format_count, table

if TYPE_CHECKING:
    from relex_stream.summaries import Plan


def describe_plan(plan: Plan) -> list[str]:
    """Return a table of the stages, then how the projection adds up."""
    lines = table(
        ("stage", "tasks", "read", "write", "memory per worker"),
        [
            (
                stage.name,
                f"{stage.tasks:,}",
                format_bytes(stage.read_bytes),
                format_bytes(stage.write_bytes),
                format_bytes(stage.worker_bytes),
            )
            for stage in plan.stages
        ],
        "lrrrr",
    )
    widest = max((stage.worker_bytes for stage in plan.stages), default=0)
    lines.append("")
    lines.append(
        f"projected memory {format_bytes(plan.projected_bytes)} of "
        f"{format_bytes(plan.memory_limit_bytes)} allowed: "
        f"{format_bytes(plan.reserved_bytes)} before the work, "
        f"{format_bytes(plan.shared_bytes)} shared, "
        f"{format_count(plan.workers, 'worker')} of {format_bytes(widest)}"
        + (f"; in each of {plan.processes} processes" if plan.processes > 1 else "")
    )
    if plan.devices_reason:
        lines.append(f"devices: {plan.devices_reason}")
    if plan.devices is not None:
        lines.append(
            f"projected device memory {format_bytes(plan.devices.projected_bytes)} of "
            f"{format_bytes(plan.devices.memory_limit_bytes)} allowed, of each device: "
            f"{format_count(plan.devices.slots, 'block')} of "
            f"{format_bytes(plan.devices.block_bytes)}"
        )
    return lines
