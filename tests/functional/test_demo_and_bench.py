"""The demo and the benchmarks: they end well, leave nothing behind, and say what scripts rely on."""

import itertools
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cipherfleet.app.bench.figure8 import OPENSSL_RATIOS, OPERATIONS, SIZES
from cipherfleet.app.bench.peers import SYSTEM
from tests.support import command

pytestmark = pytest.mark.alone

PEERS = Path(__file__).parents[2] / ".peers" / "bin" / "python"


@pytest.fixture
def only_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Everything temporary goes below one folder, which must be empty again; no process, and nothing in other places, is left."""
    temporary, home = tmp_path / "tmp", tmp_path / "home"
    temporary.mkdir()
    home.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setenv("HOME", str(home))
    for name in ("XDG_STATE_HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", None)
    before = _around()
    yield temporary
    assert [*temporary.iterdir(), *home.iterdir()] == []
    assert _around() <= before


def _around() -> set[str]:
    """Processes of this installation (by id and start), network namespaces and shared memory on this machine."""
    mark = {"cipherfleet.app.roles", sys.executable}
    ours = [p for p in psutil.process_iter(["cmdline", "create_time"]) if mark <= set(p.info["cmdline"] or [])]
    places = [path for folder in ("/run/netns", "/dev/shm") if (at := Path(folder)).is_dir() for path in at.iterdir()]
    return {f"process {p.pid} {p.info['create_time']}" for p in ours} | {str(path) for path in places}


def test_the_demo_tells_the_whole_story_and_leaves_nothing(only_here: Path) -> None:
    told = command("demo", "--megabytes", "5", "--json").document
    steps = {step["title"].split(";")[0]: step for step in told["steps"]}
    assert len(steps) == 12
    plugged = steps["acme plugs its Ukey in"]
    assert [t["step"] for t in plugged["trace"]] == list(range(1, 10))
    assert steps["It is decrypted and compared"]["compared"] == "equal"
    assert steps["A signature is made, and checked by openssl"]["openssl"] in ("Verified OK", "not installed, so not checked")
    assert steps["A second consumer knocks at acme's VCM with its own certificate"]["refused"] == "certificate-invalid"
    assert steps["acme pulls its Ukey"]["refused"]
    assert told["s"] < 60
    assert os.environ["TMPDIR"] == str(only_here)


def said(bench: str) -> dict[str, Any]:
    """What scripts rely on."""
    told: dict[str, Any] = command("bench", bench, "--quick", "--json").document
    assert told["bench"] == bench
    for row in told["rows"]:
        assert {"size", "vcms", "where", "ops_s", "bytes_s", "p50_us", "p99_us"} <= set(row)
        assert row["p50_us"] > 0
    return told


def test_the_network_is_measured_beside_its_limits(only_here: Path) -> None:
    told = said("network")
    measured = {(r["operation"], r["where"], r["size"], r["connections"]) for r in told["rows"]}
    for operation in ("encrypt", "sign", "digest", "random"):
        for size in (64, 16 * 1024, 1024 * 1024):
            assert {(operation, where, size, count) for where in ("vcm", "null", "echo") for count in (1, 8)} <= measured
    assert {r["operation"] for r in told["rows"] if r["where"] == "direct"} == {"encrypt", "digest"}
    assert {r["operation"] for r in told["rows"]} == {"encrypt", "sign", "digest", "random", "decrypt"}
    ratios = {(r["ratio"], r["operation"], r["size"], r["connections"]): r["value"] for r in told["ratios"]}
    assert ratios["vcm/direct", "encrypt", 1024 * 1024, 1] < 1
    assert ratios["vcm/direct", "digest", 64, 1] < 1
    assert ratios["vcm/echo", "encrypt", 64, 8] < 1
    assert ratios["vcm/null", "digest", 64, 1] > 0


@pytest.mark.slow
@pytest.mark.skipif(not (PEERS.parent.parent / ".installed").exists(), reason="the peers are not installed: make peers")
def test_peers_do_the_same_job_beside_it(only_here: Path) -> None:
    """Each from its packages, with its own client; what one does not do is said."""
    before = set(Path("/tmp").glob("peers-*"))
    told = command("bench", "network", "--quick", "--json", "--peers", PEERS).document
    ratios = {(r["ratio"], r["operation"], r["size"]): r["value"] for r in told["ratios"] if r.get("connections") == 1}
    here, jobs = (
        told["machine"],
        {"softhsm2": ("encrypt", "sign", "digest", "random"), "moto": ("encrypt", "sign", "random"), "pykmip": ("encrypt",)},
    )
    for peer, operations in jobs.items():
        if f"{peer}, not there" not in here:
            assert all(ratios[f"vcm/{peer}", operation, 64] > 0 for operation in operations)
            assert peer == "softhsm2" or here[f"{peer}, digest from 64 bytes up"] == "not offered"
    assert not {"moto, not there", "pykmip, not there"} & set(here)
    assert here.get("softhsm2, not there", SYSTEM) == SYSTEM
    assert set(Path("/tmp").glob("peers-*")) == before


@pytest.mark.slow
def test_the_lifecycle_is_measured_with_both_launchers(only_here: Path) -> None:
    told = said("lifecycle")
    operations = {"create", "delete", "pull-to-refusal", "return-to-service", "create-one-more"}
    assert {(r["operation"], r["where"]) for r in told["rows"]} == {(o, w) for o in operations for w in ("zygote", "bubblewrap")}
    assert {r["vcms"] for r in told["rows"] if r["operation"] == "create-one-more"} == {2, 3}
    assert all(r["pss_mib"] is None or r["pss_mib"] > 1 for r in told["rows"])
    assert {r["operation"] for r in told["ratios"]} == operations - {"create-one-more"}


@pytest.mark.slow
def test_figure_8_has_every_place_and_its_pictures(only_here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path / "matplotlib"))
    told = command("bench", "figure8", "--quick", "--json", "--out", tmp_path / "out").document
    assert set(told) == {"bench", "rows", "ratios", "machine"}
    places = {(row["operation"], row["size"], row["where"], row["vcms"]) for row in told["rows"]}
    expected = set(itertools.product(OPERATIONS, SIZES, ("vcm", "host", "engine", "direct"), (1,)))
    expected |= set(itertools.product(OPERATIONS, SIZES, ("vcm",), (8,)))
    if told["machine"]["openssl"] != "not installed, left out":
        expected |= set(itertools.product(("aes-256-gcm", "aes-256-cbc", "sha-256"), OPENSSL_RATIOS, ("openssl",), (1,)))
    assert places == expected
    for row in told["rows"]:
        assert row["spread"][0] <= row["ops_s"] <= row["spread"][1]
        assert row["where"] == "openssl" or row["p50_us"] >= 0
    related = {(r["ratio"], r["operation"], r["size"], r["vcms"]) for r in told["ratios"]}
    assert related >= set(itertools.product(("vcm/host", "vcm/direct"), OPERATIONS, (16, 64 * 1024), (1, 8)))
    raw = json.loads((tmp_path / "out" / "figure8.json").read_bytes())
    assert (raw["rows"], raw["ratios"]) == (told["rows"], told["ratios"])
    assert len(raw["measurements"]) > len(raw["rows"])
    assert (tmp_path / "out" / "figure8.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert (tmp_path / "out" / "figure8.svg").read_bytes().startswith(b"<?xml")


def test_isolation_says_what_a_flood_costs_and_how_equals_share(only_here: Path) -> None:
    told = command("bench", "isolation", "--quick", "--json").document
    assert {(row["operation"], row["where"]) for row in told["rows"]} == {
        ("quiet", "alone"),
        ("quiet", "alone again"),
        ("quiet", "beside a flood"),
        ("flood", "beside a flood"),
        ("first", "beside its equal"),
        ("second", "beside its equal"),
        ("first", "beside weight 3"),
        ("second", "beside weight 3"),
    }
    value = {r["ratio"]: r["value"] for r in told["ratios"]}
    assert set(value) == {
        "p50 beside a flood/alone",
        "p99 beside a flood/alone",
        "p50 alone again/alone",
        "p99 alone again/alone",
        "share of equals",
        "share of weight 3",
    }
    assert 0.5 < value["share of equals"] < 2
    assert 1.5 < value["share of weight 3"] < 6


def test_many_keys_are_measured_beside_few(only_here: Path) -> None:
    told = said("keys")
    measured = {(r["operation"], r["where"]) for r in told["rows"]}
    for operation in ("list page", "describe", "encrypt", "find by label", "start of a VCM", "import of a batch"):
        assert {(operation, "100 keys"), (operation, "3000 keys")} <= measured
    ratios = {(r["ratio"], r["operation"]): r["value"] for r in told["ratios"]}
    assert 0 < ratios["3000 keys/100 keys, p50_us", "describe"] < 10
    assert len(ratios) == 10
