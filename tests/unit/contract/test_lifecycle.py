"""Nine steps, eight steps, in order; every failure names what to undo."""

import pytest

from cipherfleet.contract.errors import NoCapacity
from cipherfleet.contract.lifecycle import CREATION, DELETION, Actor, Process, Run, RunState


def walk(run: Run, steps: int) -> None:
    for number in range(1, steps + 1):
        run.complete(number, at=1000.0 + number, ms=float(number))


def test_creation_has_the_papers_nine_steps_and_actors() -> None:
    assert [s.number for s in CREATION] == list(range(1, 10))
    assert [s.actor for s in CREATION][:8] == [
        Actor.TERMINAL,
        Actor.KMC,
        Actor.AUTHENTICATION,
        Actor.SCHEDULER,
        Actor.NETWORK,
        Actor.IMAGE_STORE,
        Actor.AUTHENTICATION,
        Actor.TERMINAL,
    ]


def test_deletion_has_the_papers_eight_steps() -> None:
    assert [s.number for s in DELETION] == list(range(1, 9))
    assert DELETION[1].actor is Actor.KMC


@pytest.mark.parametrize("process", list(Process))
def test_a_whole_run_is_done_and_traced(process: Process) -> None:
    run = Run(process)
    walk(run, len(run.steps))
    assert run.state is RunState.DONE
    assert run.next_step is None
    assert [(t.step, t.actor, t.ms) for t in run.trace] == [(s.number, s.actor, float(s.number)) for s in run.steps]


@pytest.mark.parametrize("failing", range(1, 10))
def test_a_failed_creation_undoes_everything_newest_first(failing: int) -> None:
    run = Run(Process.CREATE)
    walk(run, failing - 1)
    undo = run.fail(failing, NoCapacity("full"), at=0.0, ms=0.0)
    assert [s.number for s in undo] == list(range(failing, 0, -1))
    assert run.state is RunState.FAILED
    assert run.trace[-1].error == "no-capacity"


@pytest.mark.parametrize("failing", range(1, 9))
def test_a_failed_deletion_undoes_nothing(failing: int) -> None:
    run = Run(Process.DELETE)
    walk(run, failing - 1)
    assert run.fail(failing, NoCapacity("gone"), at=0.0, ms=0.0) == ()


@pytest.mark.parametrize("wrong", [0, 1, 3, 9])
def test_steps_out_of_order_are_our_bug(wrong: int) -> None:
    run = Run(Process.CREATE)
    walk(run, 1)
    with pytest.raises(RuntimeError, match="out of order"):
        run.complete(wrong, at=0.0, ms=0.0)


def test_nothing_follows_a_failure() -> None:
    run = Run(Process.CREATE)
    run.fail(1, NoCapacity("full"), at=0.0, ms=0.0)
    with pytest.raises(RuntimeError):
        run.complete(1, at=0.0, ms=0.0)


def test_another_actor_may_do_a_step_by_force() -> None:
    run = Run(Process.DELETE)
    assert run.complete(1, at=0.0, ms=0.0, actor=Actor.OPERATOR).actor is Actor.OPERATOR
