"""The table and the picture of `benchmarks/speed.py`."""

from pathlib import Path

OURS = "butterfly"


def cases(records: list[dict]) -> dict[tuple, dict[str, dict]]:
    """Measured records by case (what, d, experts, k, tokens), then by peer."""
    found: dict[tuple, dict[str, dict]] = {}
    for record in records:
        if "seconds" in record:
            case = tuple(record[name] for name in ("what", "d", "experts", "k", "tokens"))
            found.setdefault(case, {})[record["peer"]] = record
    return {case: peers for case, peers in found.items() if OURS in peers}


def table(records: list[dict]) -> str:
    """A line a case: time of our step, its multiple of the limit, and its ratio to every peer's."""
    lines = []
    for (what, d, experts, k, tokens), found in cases(records).items():
        ours = found[OURS]
        line = f"{what:6} d={d:4} N={experts:3} k={k} tokens={tokens:5}"
        line += f" {1e3 * ours['seconds']:9.3f} ms"
        if "limit_seconds" in ours:
            line += f" ({ours['seconds'] / ours['limit_seconds']:.2f}x limit)"
        for peer, other in found.items():
            if peer != OURS:
                line += f"  {ours['seconds'] / other['seconds']:.2f}x {peer}"
        lines.append(line)
    return "\n".join(lines)


def draw(content: dict, path: Path) -> None:
    """Our time over every peer's: training by experts, decoding by tokens; a row a width."""
    import matplotlib.pyplot as plt

    found = cases(content["records"])
    peers = sorted({peer for one in found.values() for peer in one if peer != OURS})
    colours = dict(zip(peers, plt.get_cmap("tab10").colors, strict=False))
    widths = sorted({case[1] for case in found})
    figure, axes = plt.subplots(
        len(widths), 2, figsize=(10, 1 + 2.3 * len(widths)), squeeze=False, layout="constrained"
    )
    for row, d in enumerate(widths):
        for column, what in enumerate(("train", "decode")):
            axis = axes[row][column]
            some = {case: one for case, one in found.items() if case[:2] == (what, d)}
            if not some:
                axis.set_axis_off()
                continue
            styles = dict(zip(sorted({case[3 if what == "train" else 2] for case in some}),
                              ("-", "--", ":"), strict=False))  # fmt: skip
            for peer in peers:
                lines: dict[int, list] = {}
                for (_, _, experts, k, tokens), one in some.items():
                    if peer in one:
                        x, line = (experts, k) if what == "train" else (tokens, experts)
                        ratio = one[OURS]["seconds"] / one[peer]["seconds"]
                        lines.setdefault(line, []).append((x, ratio))
                for line, points in sorted(lines.items()):
                    points.sort()
                    axis.plot(
                        *zip(*points, strict=True), color=colours[peer],
                        linestyle=styles.get(line, "-."), marker="o", markersize=3,
                        label=f"{peer}, {'top-' if what == 'train' else 'N='}{line}",
                    )  # fmt: skip
            axis.axhline(1, color="black", linewidth=0.8)
            axis.set(xscale="log", yscale="log", ylim=(0.1, 40), title=f"{what}, d={d}")
            ticks = sorted({case[2] if what == "train" else case[4] for case in some})
            axis.set_xticks(ticks, [str(tick) for tick in ticks])
            axis.minorticks_off()
            steps = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20)
            axis.set_yticks(steps, [f"{step:g}" for step in steps])
            axis.set_xlabel("experts" if what == "train" else "tokens")
            axis.set_ylabel("our time / peer's")
            axis.grid(alpha=0.3)
            axis.legend(fontsize=6, ncols=3, loc="upper center")
    figure.suptitle(f"One layer, {content['facts']['name']}; below 1 ours is faster")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
