"""The JSON lines of `gpu_check.py` as tables in Markdown, for docs/performance.md."""

from pathlib import Path


def write_table(file: Path, found: list[dict], went: list[dict]) -> None:
    """found: lines of benchmarks, each with its `part`. went: how the parts went."""
    by_kind: dict[str, list[dict]] = {}
    for line in found:
        by_kind.setdefault(line["benchmark"], []).append(line)
    blocks = [_parts(went)]
    for kind, lines in by_kind.items():
        rates = [row for line in lines for row in _rates(line)]
        blocks.append(_about(kind, lines[0]) + (_table(rates) if rates else _table([_plain(line) for line in lines])))
    file.write_text("\n".join(blocks), encoding="utf-8")


def _about(kind: str, line: dict) -> str:
    compilers = [f"{name} {line[name]}" for name in ("jax", "libtpu", "jax-cuda12-plugin") if name in line]
    return f"### {kind}\n\n{', '.join([*filter(None, [line.get('machine')]), *compilers, line['date']])}\n\n"


def _parts(went: list[dict]) -> str:
    return "### Parts\n\n" + _table(
        [
            {
                "part": told["part"],
                "went": told["status"] + (f": {told['why']}" if told.get("why") else ""),
                "seconds": told.get("seconds", ""),
                "limit": told.get("limit", ""),
            }
            for told in went
        ]
    )


def _rates(line: dict) -> list[dict]:
    """A row for each `... per second`, with the other side's rate and the ratio where there is one."""
    rows = []
    for what in (name for name in line if name.endswith(" per second")):
        rate, case = line[what], line.get("case") or line.get("cases") or ""
        row = {"task": f"{line['part']} {case}".strip(), "what": what, "ours": f"{rate['ours']:,.0f}"}
        for side in (name for name in rate if "ours" not in name):
            pairs = ", ".join(f"{ratio:.2f}" for ratio in rate[f"ours / {side}"])
            row[side] = f"{rate[side]:,.0f}"
            row[f"ours / {side}"] = f"{rate[f'median ours / {side}']:.2f} ({pairs})"
        mfu = line.get("MFU", {}).get("ours")
        row["MFU"] = "" if mfu is None else f"{mfu:.1%}"
        rows.append(row)
    return rows


def _plain(line: dict) -> dict:
    """What a line holds, but for what all lines say and what is long."""
    hidden = ("benchmark", "date", "machine", "jax", "libtpu", "jax-cuda12-plugin", "settings")
    return {name: _cell(value) for name, value in line.items() if name not in hidden}


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_cell(inner)}" for name, inner in value.items())
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _table(rows: list[dict]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns), *([row.get(name, "") for name in columns] for row in rows)]
    return "".join("| " + " | ".join(str(cell).replace("|", "/") for cell in line) + " |\n" for line in lines)
