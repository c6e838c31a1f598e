"""The other systems that `bench network` is compared with: what cannot run is said, what they do not do is not asked twice."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cipherfleet.app.bench import peer_load
from cipherfleet.app.bench.peers import SLOW_S, Load, Peer, Unfit, started
from tests.support import command

NOBODY = Path("/nonexistent/python")


async def test_a_peer_that_cannot_run_here_is_named_with_its_reason() -> None:
    async with started(NOBODY, 2) as (peers, missing):
        assert peers == []
        assert set(missing) == set(peer_load.PEERS)
        assert all(missing.values())


async def test_libraries_that_are_not_there_are_said_by_the_load() -> None:
    """The load runs alone: with an interpreter that has neither this package nor the peer's library."""
    for peer in peer_load.PEERS:
        finished = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-I", "-S", peer_load.__file__],
            input=json.dumps({"peer": peer, "connections": 1}) + "\n",
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        assert json.loads(finished.stdout)["error"].startswith("ModuleNotFoundError")


def test_a_load_counts_what_ended_in_time_on_every_connection() -> None:
    called: list[int] = []
    jobs: list[peer_load.Jobs] = [{"encrypt": lambda data: lambda: called.append(len(data))} for _ in range(3)]
    ask: dict[str, Any] = {"operation": "encrypt", "size": 7, "connections": 2, "seconds": 0.05}
    taken = peer_load.answer(jobs, ask)["taken"]
    assert 2 <= len(taken) <= len(called)
    assert set(called) == {7}
    assert all(0 <= seconds < 0.05 for seconds in taken)


def test_a_load_says_what_is_not_offered_and_what_fails() -> None:
    def fail() -> None:
        raise ValueError("too long")

    jobs: list[peer_load.Jobs] = [{"encrypt": lambda _: fail}]
    ask: dict[str, Any] = {"operation": "encrypt", "size": 7, "connections": 1, "seconds": 0.05}
    assert peer_load.answer(jobs, ask) == {"error": "ValueError: too long"}
    assert peer_load.answer(jobs, {**ask, "operation": "digest"}) == {"error": "not offered"}
    with pytest.raises(ValueError, match="too long"):
        peer_load.load([fail], 0.05)


class Told(Load):
    """A load that answers what a test tells it to."""

    def __init__(self, answers: list[dict[str, Any] | Unfit]) -> None:
        self.asked: list[dict[str, Any]] = []
        self._answers = answers

    async def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        self.asked.append(question)
        answer = self._answers.pop(0)
        if isinstance(answer, Unfit):
            raise answer
        return answer


async def test_connections_are_threads_of_one_load_or_loads_of_their_own() -> None:
    one = Told([{"taken": [0.1, 0.2]}])
    assert await Peer("one", [one]).measure("sign", 64, 4, 0.1) == [0.1, 0.2]
    assert one.asked == [{"operation": "sign", "size": 64, "seconds": 0.1, "connections": 4}]
    several = [Told([{"taken": [0.01 * n]}]) for n in range(1, 5)]
    assert await Peer("several", list(several)).measure("sign", 64, 3, 0.1) == [0.01, 0.02, 0.03]
    assert [len(load.asked) for load in several] == [1, 1, 1, 0]
    assert several[0].asked[0]["connections"] == 1


@pytest.mark.parametrize("answer", [{"error": "not offered"}, Unfit("its client gave no answer")])
async def test_what_a_peer_refuses_is_not_asked_for_again(answer: dict[str, Any] | Unfit) -> None:
    load = Told([answer, {"taken": [0.1]}, {"taken": [0.1]}])
    peer = Peer("told", [load])
    for size in (64, 64, 4096):
        assert await peer.measure("encrypt", size, 1, 0.1) is None
    assert len(load.asked) == 1
    assert list(peer.refused) == [("encrypt", 64)]
    assert await peer.measure("sign", 64, 1, 0.1) == [0.1]


async def test_what_is_slow_is_not_made_larger() -> None:
    load = Told([{"taken": [2 * SLOW_S]}, {"taken": [2 * SLOW_S]}])
    peer = Peer("slow", [load])
    assert await peer.measure("encrypt", 64, 1, 0.1) == [2 * SLOW_S]
    assert await peer.measure("encrypt", 65, 1, 0.1) is None
    assert await peer.measure("encrypt", 64, 1, 0.1) == [2 * SLOW_S]  # the size itself is measured in every round
    assert "64 bytes" in peer.refused["encrypt", 65]


async def test_a_load_that_is_gone_is_no_answer() -> None:
    process = await asyncio.create_subprocess_exec("/bin/true", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE)
    await process.wait()
    with pytest.raises(Unfit, match="no answer"):
        await Load(process).ask({"peer": "moto"})


def test_peers_of_an_environment_that_is_not_there_are_refused() -> None:
    refused = command("bench", "network", "--peers", NOBODY, "--json")
    assert refused.document["error"]["code"] == "file-problem"
    assert "make peers" in refused.document["error"]["hint"]
