"""A plan as tables for the terminal."""

from __future__ import annotations

from rich.table import Table

from ardist.plan.plan import STAGES, Plan


def plan_tables(plan: Plan) -> list[Table]:
    """What the run is and takes, then its memory by ZeRO stage and checkpointing mode."""
    return [_overview(plan), _memory(plan)]


def _overview(plan: Plan) -> Table:
    table = Table(title=f"{plan.task} on {plan.gpus} x {plan.device}, {plan.precision}", title_justify="left")
    table.add_column("quantity")
    table.add_column("value", justify="right")
    table.add_column("note", style="dim")
    table.add_row("parameters", f"{plan.parameters:,}", f"checkpoint {size(plan.checkpoint_bytes)}")
    table.add_row(
        "tokens per clip",
        f"{plan.tokens_per_clip:,}",
        f"{plan.num_frames} frames" + (", the longest" if len(plan.kinds) > 1 else ""),
    )
    flops = f"{plan.flops_per_clip / 1e12:.3g} TFLOP"
    table.add_row("FLOPs per clip", flops, "forward and backward, recomputation not counted")
    for kind in plan.kinds:
        batch = f"{kind.micro_batch} clips x {plan.accumulation} x {plan.gpus} ranks"
        if len(plan.kinds) > 1:
            batch += f": {kind.share:.0%} of the steps, {kind.frames} frames each, of {kind.name}"
        table.add_row("global batch", f"{kind.global_batch:,} clips", batch)
    epochs = "" if not plan.samples else f"{plan.total_clips / plan.samples:,.1f} epochs of {plan.samples:,} clips"
    table.add_row("the whole run", f"{plan.total_tokens:.3g} tokens", epochs)
    if plan.speed is None:
        table.add_row("speed", "n/a", "the peak of this device in this precision, or the FLOPs, are not known")
    else:
        table.add_row("speed", f"{plan.speed.clips_per_second:,.1f} clips/s", f"at {plan.mfu:.0%} MFU")
        table.add_row("", f"{plan.speed.tokens_per_second:,.0f} tokens/s", f"{plan.speed.step_seconds:.3g} s per step")
        table.add_row("time to finish", f"{plan.speed.days:,.3g} days", "without validation, checkpoints and failures")
        table.add_row(
            "data to read", f"{size(plan.speed.read_bytes_per_second)}/s", f"{size(plan.sample_bytes)} per clip"
        )
    for note in plan.notes:
        table.add_row("note", "", note)
    return table


def _memory(plan: Plan) -> Table:
    modes = list(dict.fromkeys(mode for _, mode in plan.memory))
    title = f"memory of a rank, of {plan.device_bytes / 2**30:.0f} GiB (red: does not fit; bold: as configured)"
    table = Table(title=title, title_justify="left")
    for name in ("ZeRO", "weights", "gradients", "optimiser", "averages", "copies"):
        table.add_column(name, justify="right")
    for mode in modes:
        table.add_column(f"peak, checkpointing {mode}", justify="right")
    for stage in STAGES:
        parts = plan.memory[stage, modes[0]]
        state = (
            parts.weights + parts.gathered,
            parts.gradients,
            parts.masters + parts.moments,
            parts.averages,
            parts.copies,
        )
        peaks = []
        for mode in modes:
            memory = plan.memory[stage, mode]
            style = ("bold " if (stage, mode) == plan.chosen else "") + ("green" if plan.fits(memory) else "red")
            peaks.append(f"[{style}]{size(memory.total)}[/]")
        table.add_row(str(stage), *(size(value) for value in state), *peaks)
    return table


def size(value: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.3g} {unit}" if value < 100 else f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:.3g} TiB"
