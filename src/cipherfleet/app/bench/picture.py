"""Figure 8 as a picture, PNG and SVG. Needs matplotlib, which the extra ``bench`` brings."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cipherfleet.app.bench.report import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANELS = (
    ("null", "(a) null"),
    ("aes-256-gcm", "(b) AES-256-GCM"),
    ("aes-256-cbc", "(b) AES-256-CBC"),
    ("sha-256", "(c) SHA-256"),
)
CAPTION = (
    "The paper's Figure 8 comes from 4 hosts with 2 x Xeon E5-2620 v3 and six QAT DH895XCC accelerators each, OpenStack Newton, CentOS 7;\n"
    "its text gives null operations about equal in VCM and host, AES a little slower, hash 20 to 50 % slower.\n"
    "Here card and VCMs are processes of one host with {processors} processors. Points: medians of {rounds} rounds; bars: quartiles."
)
_MARKERS = ("o", "s", "^", "D", "v", "x")


def draw(rows: list[Row], ratios: list[Row], machine: dict[str, Any], folder: Path) -> list[Path]:
    """Raises ``ImportError`` where there is no matplotlib."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(len(PANELS), 2, figsize=(12, 17), width_ratios=(3, 2), layout="constrained")
    places = list(dict.fromkeys((r["where"], r["vcms"]) for r in rows))
    for (operation, title), (speed, relation) in zip(PANELS, panels, strict=True):
        for number, place in enumerate(places):
            found = [r for r in rows if r["operation"] == operation and (r["where"], r["vcms"]) == place]
            _curve(speed, found, "ops_s", _label(*place), f"C{number}", _MARKERS[number])
        speed.set(title=title, ylabel="operations per second", yscale="log")
        speed.legend(fontsize="small")
        for number, vcms in enumerate(v for where, v in places if where == "vcm"):
            found = [r for r in ratios if (r["ratio"], r["operation"], r["vcms"]) == ("vcm/host", operation, vcms)]
            _curve(relation, found, "value", _label("vcm", vcms), f"C{places.index(('vcm', vcms))}", _MARKERS[number])
        relation.axhline(1, color="grey", linewidth=1, linestyle="--")
        relation.set(title=f"{title}: VCM / host", ylabel="ratio of throughput", ylim=(0, max(1.1, relation.get_ylim()[1])))
        relation.legend(fontsize="small")
        for axes in (speed, relation):
            _sizes(axes, sorted({r["size"] for r in rows}))
    figure.supxlabel(CAPTION.format(processors=machine["processors"], rounds=max(r["rounds"] for r in rows)), fontsize="small")
    files = [folder / "figure8.png", folder / "figure8.svg"]
    for file in files:
        figure.savefig(file, dpi=150)
    pyplot.close(figure)
    return files


def _curve(axes: "Axes", found: list[Row], name: str, label: str, colour: str, marker: str) -> None:
    if not found:
        return
    typical = [r[name] for r in found]
    below = [max(0.0, r[name] - r["spread"][0]) for r in found]
    above = [max(0.0, r["spread"][1] - r[name]) for r in found]
    look: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 4, "capsize": 2, "linewidth": 1.2}
    axes.errorbar([r["size"] for r in found], typical, yerr=[below, above], label=label, **look)


def _sizes(axes: "Axes", sizes: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [short(size) for size in sizes], fontsize="small")
    axes.set_xlabel("block size")
    axes.grid(visible=True, alpha=0.3)


def _label(where: str, vcms: int) -> str:
    names = {"host": "host, at the card", "engine": "engine alone", "direct": "library call", "openssl": "openssl speed"}
    return names.get(where, "1 VCM" if vcms == 1 else f"{vcms} VCMs")


def short(size: int) -> str:
    """16 B, 4 KiB, 1 MiB."""
    power = 2 if size >= 1024**2 else 1 if size >= 1024 else 0
    return f"{size // 1024**power} {('B', 'KiB', 'MiB')[power]}"
