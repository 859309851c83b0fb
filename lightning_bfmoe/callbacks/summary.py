"""The few lines that a training prints about its swap; `print(callback.report)` has the table."""

from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_bfmoe.swap import SwapReport


def summary_lines(report: SwapReport) -> list[str]:
    """One line per kind of block, then the sums.

    Example:
        >>> from torch import nn
        >>> from lightning_bfmoe import swap_feed_forward
        >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
        >>> for line in summary_lines(swap_feed_forward(model, num_experts=4)):
        ...     print(line)
        1 x 8 > 32 > 8 relu -> 4 experts: 0
        552 -> 1.3 k parameters; 2.2 KiB as held before, 2.0 KiB packed after training

    Args:
        report: What `swap_feed_forward` returned.
    """
    kinds: dict[str, list[str]] = {}
    for b in report.blocks:
        gate = ", gated" if b.gated else ""
        router = ", the model's router" if b.own_router else ""
        kind = f"{b.d_model} > {b.d_ff} > {b.d_out} {b.activation}{gate} -> {b.num_experts} experts"
        kinds.setdefault(kind + router, []).append(b.path)
    lines = [f"{len(paths)} x {kind}: {_ends(paths)}" for kind, paths in kinds.items()]
    sums = report.totals()
    before, after = (_short(sums[f"parameters_{when}"], 1000, "") for when in ("before", "after"))
    held, packed = (_short(sums[name], 1024, "iB") for name in ("bytes_before", "packed_bytes"))
    lines.append(
        f"{before} -> {after} parameters; {held} as held before, {packed} packed after training"
    )
    return lines


@rank_zero_only
def show_summary(report: SwapReport) -> None:
    """Print the lines, on the first process only."""
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False)
    first, *others = summary_lines(report)
    console.print(f"[bold cyan]ButterflyMoE[/] {first}")
    for line in others:
        console.print(f"             {line}")


def _ends(paths: list[str]) -> str:
    return paths[0] if len(paths) == 1 else f"{paths[0]} ... {paths[-1]}"


def _short(number: float, base: int, unit: str) -> str:
    names = ("", "k", "M", "G") if base == 1000 else ("B", "K", "M", "G")
    power = 0
    while number >= base and power < 3:
        number, power = number / base, power + 1
    text = f"{number:.1f}" if power else f"{number:.0f}"
    suffix = names[power] if base == 1000 or not power else names[power] + unit
    return f"{text} {suffix}".rstrip()
