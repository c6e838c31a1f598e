"""The list of events is whole: what the code writes stands in it, and what stands in it is written somewhere."""

import ast
from pathlib import Path

import cipherfleet
from cipherfleet.contract.audit_events import KEY_EVENTS, MANAGEMENT_EVENTS, PLATFORM_EVENTS

SOURCE = Path(cipherfleet.__file__).parent
ROOMS = ("contract", "kmc", "computing", "management")
THIRD = {"audit": 2, "audit_refusal": 2, "progress": 2, "_refused": 1, "Line": 2, "Decision": 0}
"""Calls that name their event by position, and where."""


def strings(node: ast.expr) -> set[str]:
    """What an expression may be: literals, also of a choice between two."""
    match node:
        case ast.Constant(value=str(text)):
            return {text}
        case ast.IfExp(body=body, orelse=orelse):
            return strings(body) | strings(orelse)
        case ast.Lambda(body=body):
            return strings(body)
        case ast.BoolOp(values=values):
            return set().union(*map(strings, values))
        case ast.Dict(values=values):
            return set().union(*map(strings, values))
    return set()


def written() -> set[str]:
    found: set[str] = set()
    for path in (path for room in ROOMS for path in (SOURCE / room).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                found |= set().union(*(strings(k.value) for k in node.keywords if k.arg == "event"), set())
                if name in THIRD and len(node.args) > THIRD[name]:
                    found |= strings(node.args[THIRD[name]])
                if name.startswith("_create"):  # the keys' store hands its event down
                    found |= set().union(*map(strings, node.args), set())
                if name == "_write_version":
                    found |= set().union(*map(strings, node.args), set())
            if isinstance(node, ast.FunctionDef) and node.name == "event":  # the two-person rule decides
                found |= set().union(
                    *(strings(said.value) for said in ast.walk(node) if isinstance(said, ast.Return) and said.value), set()
                )
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple) and getattr(node.targets[0], "id", "") == "MANY":
                found |= strings(node.value.elts[2])
            if isinstance(node, ast.Assign) and any(getattr(target, "id", "") in ("event", "_EVENTS") for target in node.targets):
                found |= strings(node.value)
    return {name for name in found if name}


def test_every_event_is_in_the_list_and_every_one_in_the_list_is_written() -> None:
    listed = {*PLATFORM_EVENTS, *MANAGEMENT_EVENTS, *KEY_EVENTS}
    assert written() == listed, (written() - listed, listed - written())


def test_a_vcm_management_and_the_kmc_have_events_of_their_own() -> None:
    assert len({*PLATFORM_EVENTS, *MANAGEMENT_EVENTS, *KEY_EVENTS}) == sum(map(len, (PLATFORM_EVENTS, MANAGEMENT_EVENTS, KEY_EVENTS)))
