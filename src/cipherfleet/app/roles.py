"""One process, one role: ``python -m cipherfleet.app.roles ROLE``, configuration on standard input.

Each role imports its own room alone: a process holds no code that it has no use for.
"""

import sys
from collections.abc import Callable
from functools import partial

from cipherfleet.channel.process import run


def _hsm() -> int:
    from cipherfleet.kmc.process import HsmConfig, hsm_main

    return run(hsm_main, HsmConfig)


def _kmc() -> int:
    from cipherfleet.kmc.process import KmcConfig, kmc_main

    return run(kmc_main, KmcConfig)


def _management() -> int:
    from cipherfleet.management.process import ManagementConfig, main

    return run(main, ManagementConfig)


def _machine() -> int:
    from cipherfleet.computing.machine import MachineConfig, main

    return run(main, MachineConfig)


def _card() -> int:
    from cipherfleet.computing.card_process import CardConfig, main

    return run(main, CardConfig)


def _vcm() -> int:
    from cipherfleet.computing.vcm_process import VcmConfig, main
    from cipherfleet.services.components import mount

    return run(partial(main, mount=mount), VcmConfig)


def _terminal() -> int:
    from cipherfleet.terminal.process import TerminalConfig, main

    return run(main, TerminalConfig)


ROLES: dict[str, Callable[[], int]] = {
    "hsm": _hsm,
    "kmc": _kmc,
    "management": _management,
    "machine": _machine,
    "card": _card,
    "vcm": _vcm,
    "terminal": _terminal,
}

if __name__ == "__main__":
    sys.exit(ROLES[sys.argv[1]]())
