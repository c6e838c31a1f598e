"""What benchmarks compute, without measuring: arrivals, medians, ratios, openssl's words, the picture."""

import itertools
import statistics
import sys
import time
from pathlib import Path

import pytest

from cipherfleet.app.bench import figure8, isolation, openssl, picture, samples
from cipherfleet.app.bench.bare_engine import by_library, through_a_function
from cipherfleet.app.bench.report import Row
from cipherfleet.app.bench.samples import Sample
from cipherfleet.app.bench.task_queue import Counted, Slice, Tally, quantiles
from cipherfleet.app.bench.workload import Handles, requests_with, through_a_vcc
from cipherfleet.contract.vcc import Completion, Operation
from tests.support import command
from tests.unit.computing.card.consumer import Function


def soon(operation: str, size: int = 64, *, mean_s: float = 1e-6, seconds: float = 0.05, direct: bool = False) -> Slice:
    now = time.monotonic()
    return Slice(operation, size, now, now + seconds, mean_s, direct=direct)


# -- the queue ---------------------------------------------------------------------------------------------------------


def test_quantiles_are_all_values_or_evenly_spaced_ones() -> None:
    assert quantiles([3.0, 1.0, 2.0], 3) == [1.0, 2.0, 3.0]
    assert quantiles([float(n) for n in range(1000)], 4) == [125.0, 375.0, 625.0, 875.0]
    assert quantiles([], 4) == []


def test_arrivals_are_a_poisson_process_that_ends_with_the_slice() -> None:
    now = time.monotonic()
    tally = Tally(Slice("null", 0, now, now + 1000, mean_s=0.1))
    moments = []
    while (due := tally.arrival()) is not None:
        moments.append(due)
    assert now < moments[0] and moments[-1] < now + 1000
    gaps = [later - earlier for earlier, later in itertools.pairwise(moments)]
    assert statistics.mean(gaps) == pytest.approx(0.1, rel=0.1)
    assert statistics.stdev(gaps) == pytest.approx(0.1, rel=0.1)


def test_what_ends_outside_the_slice_does_not_count() -> None:
    now = time.monotonic()
    early, late = Tally(Slice("null", 0, now + 60, now + 120)), Tally(Slice("null", 0, now - 120, now - 60))
    for tally in (early, late):
        assert tally.done(now) >= now
        assert tally.counted() == Counted(0, [])
    assert late.arrival() is None


class Echo:
    """A card that has no work, and counts how much it was asked at once."""

    def __init__(self) -> None:
        self.asked = 0

    async def submit(
        self, operation: Operation, *, handle: int = 0, parameters: bytes = b"", data: bytes | bytearray | memoryview = b""
    ) -> Completion:
        assert (operation, handle, len(data)) == (Operation.RUN, 7, 64)
        self.asked += 1
        return Completion()


async def test_a_vcm_works_off_the_queue() -> None:
    card, request = Echo(), requests_with(Handles(7, 8))["aes-256-gcm"]
    counted = await through_a_vcc(card, request, soon("aes-256-gcm"))
    assert 0 < counted.operations <= card.asked
    assert counted.latencies == sorted(counted.latencies)
    rare = await through_a_vcc(card, request, soon("aes-256-gcm", mean_s=0.01, seconds=0.2))
    assert 3 < rare.operations < 60


@pytest.mark.parametrize("operation", figure8.OPERATIONS)
def test_the_host_does_the_same_without_a_vcm(operation: str) -> None:
    function = Function()
    handles = Handles(function.generate("AES-256-GCM")[0], function.generate("AES-256-CBC")[0])
    before = function.inner.operations
    through = through_a_function(function.inner, requests_with(handles)[operation], soon(operation))
    assert 0 < through.operations <= function.inner.operations - before
    assert by_library(soon(operation, direct=True)).operations > 0


# -- what it comes to --------------------------------------------------------------------------------------------------


def of(number: int, where: str, ops_s: float, p50_us: float | None = None, *, operation: str = "sha-256", vcms: int = 1) -> Sample:
    return Sample(number, operation, 65536, vcms, where, ops_s, p50_us)


def test_a_sample_is_of_all_workers() -> None:
    made = samples.sample(3, "null", 16, "vcm", [Counted(2, [1e-6, 3e-6]), Counted(4, [2e-6])], 0.5, vcms=2)
    assert made == Sample(3, "null", 16, 2, "vcm", 12.0, 2.0, 3.0)
    assert samples.sample(0, "null", 16, "vcm", [Counted(0, [])], 0.5).p50_us is None


def test_a_row_has_the_median_and_the_spread_of_its_rounds() -> None:
    first, second = samples.rows([of(0, "vcm", 10, 5), of(1, "vcm", 40, 9), of(2, "vcm", 20, None), of(0, "openssl", 7)])
    assert (first["where"], first["rounds"], first["ops_s"], first["spread"], first["p50_us"]) == ("vcm", 3, 20, [15, 30], 7)
    assert first["bytes_s"] == 20 * 65536
    assert second["spread"] == [7, 7]
    assert (second["where"], second["p50_us"], second["p99_us"]) == ("openssl", None, None)


def test_a_ratio_is_the_median_of_the_rounds_own_ratios() -> None:
    over, under = [of(0, "vcm", 10), of(1, "vcm", 30), of(2, "vcm", 99)], [of(0, "host", 20), of(1, "host", 30)]
    (made,) = samples.ratio("vcm/host", over, under)
    assert made == {"ratio": "vcm/host", "operation": "sha-256", "size": 65536, "vcms": 1, "value": 0.75, "spread": [0.625, 0.875]}
    assert samples.ratio("vcm/host", over, []) == samples.ratio("vcm/host", over, [of(0, "host", 0)]) == []


def test_figure_8_relates_vcms_to_every_other_place() -> None:
    taken = [of(0, "vcm", 10), of(0, "vcm", 20, vcms=8), of(0, "host", 40), of(0, "direct", 80), of(0, "openssl", 160)]
    found = {(r["ratio"], r["vcms"]): r["value"] for r in figure8.ratios(taken)}
    assert found == {
        ("vcm/host", 1): 0.25,
        ("vcm/host", 8): 0.5,
        ("vcm/openssl", 1): 0.0625,
        ("vcm/openssl", 8): 0.125,
        ("vcm/direct", 1): 0.125,
        ("vcm/direct", 8): 0.25,
    }


def test_isolation_relates_latencies_and_shares() -> None:
    quiet = [of(0, where, 100, p50, operation="quiet") for where, p50 in (("alone", 10), ("alone again", 11), ("beside a flood", 20))]
    floods = [of(0, "beside its equal", speed, operation=name) for name, speed in (("first", 30), ("second", 40))]
    found = {r["ratio"]: r["value"] for r in isolation.ratios(quiet + floods)}
    assert found == {"p50 beside a flood/alone": 2.0, "p50 alone again/alone": 1.1, "share of equals": 0.75}


# -- openssl -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "speed"),
    [
        ("+DT:sha256:1:64\n+R:3128393:sha256:1.000000\n+H:64\n+F:25:sha256:200217152.00\n", 200217152.0),
        ("+H:64\n+F:25:AES-256-GCM:76337022.68", 76337022.68),
        ("+F:25:AES-256-GCM:much", None),
        ("+F:25:AES-256-GCM:1.0:2.0", None),
        ("speed: Unknown option -bytes", None),
        ("", None),
    ],
)
def test_what_openssl_speed_says(said: str, speed: float | None) -> None:
    assert openssl.parse(said) == speed


async def test_openssl_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert await openssl.version() == ""


# -- the picture -------------------------------------------------------------------------------------------------------


def test_sizes_for_people() -> None:
    assert [picture.short(size) for size in (16, 1024, 65536, 1024 * 1024)] == ["16 B", "1 KiB", "64 KiB", "1 MiB"]


def drawn_from() -> tuple[list[Row], list[Row]]:
    places = (("vcm", 1), ("vcm", 8), ("host", 1), ("direct", 1))
    taken = [Sample(n, o, s, v, w, 1e6 / s + n) for n in range(2) for o in figure8.OPERATIONS for s in (16, 1024) for w, v in places]
    return samples.rows(taken), figure8.ratios(taken)


def test_the_picture_is_a_png_and_an_svg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path / "cache"))
    png, svg = picture.draw(*drawn_from(), {"processors": 2}, tmp_path)
    assert png.read_bytes().startswith(b"\x89PNG\r\n")
    assert svg.read_bytes().startswith(b"<?xml") and b"<svg" in svg.read_bytes()


def test_without_matplotlib_there_is_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError):
        picture.draw(*drawn_from(), {"processors": 2}, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_figure_8_is_written_and_told_also_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def measured(plan: figure8.Plan, *, quiet: bool) -> figure8.Measured:
        assert (plan, quiet) == (figure8.QUICK, False)
        return figure8.Measured([of(0, "vcm", 10), of(0, "host", 20)], {"openssl": "not installed, left out"})

    monkeypatch.setattr(figure8, "figure8", measured)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    told = command("bench", "figure8", "--quick", "--out", tmp_path / "out")
    assert told.status == 0
    assert "cipherfleet[bench]" in told.stderr
    for phrase in ("vcm/host", "0.5", "openssl: not installed, left out"):
        assert phrase in told.stdout
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["figure8.json"]


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_folder_that_cannot_be_is_refused_before_anything_is_measured(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("")
    told = command("bench", "figure8", "--quick", "--json", "--out", tmp_path / "file" / below)
    assert (told.status != 0, told.document["error"]["code"]) == (True, "file-problem")
