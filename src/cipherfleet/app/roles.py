"""One process, one role: ``python -m cipherfleet.app.roles ROLE``, configuration on standard input.

Each role imports its own room alone: a process holds no code that it has no use for.
"""

import sys
from collections.abc import Callable
from functools import partial

from cipherfleet.channel.process import as_it_is, run


def _hsm() -> int:
    from cipherfleet.kmc.process import HsmConfig, hsm_main

    return run(hsm_main, HsmConfig, prepare=as_it_is)


def _kmc() -> int:
    from cipherfleet.kmc.process import KmcConfig, kmc_main

    return run(kmc_main, KmcConfig, prepare=as_it_is)


def _management() -> int:
    from cipherfleet.management.process import ManagementConfig, main

    return run(main, ManagementConfig, prepare=as_it_is)


def _machine() -> int:
    from cipherfleet.computing.machine import MachineConfig, main

    return run(main, MachineConfig, prepare=as_it_is)


def _card() -> int:
    from cipherfleet.computing.card_process import CardConfig, confined, main

    return run(main, CardConfig, prepare=confined)


def _vcm() -> int:
    return _vcm_work()()


def _vcm_work() -> Callable[[], int]:
    from cipherfleet.computing.vcm_config import VcmConfig
    from cipherfleet.computing.vcm_process import confined, main
    from cipherfleet.services.components import mount

    return partial(run, partial(main, mount=mount), VcmConfig, prepare=confined)


def _zygote() -> int:
    import uvloop  # noqa: F401 - its children need it

    from cipherfleet.channel.certificates import warm_up
    from cipherfleet.computing.zygote import serve

    work = _vcm_work()
    warm_up()
    return serve(work)


def _terminal() -> int:
    from cipherfleet.terminal.process import TerminalConfig, main

    return run(main, TerminalConfig, prepare=as_it_is)


def _bench_vcm() -> int:
    from cipherfleet.app.bench.workload import VcmWork, confined, main

    return run(main, VcmWork, prepare=confined)


def _bench_limit() -> int:
    from cipherfleet.app.bench.limits import LimitWork, main

    return run(main, LimitWork, prepare=as_it_is)


def _bench_engine() -> int:
    from cipherfleet.app.bench.bare_engine import EngineWork, main

    return run(main, EngineWork, prepare=as_it_is)


ROLES: dict[str, Callable[[], int]] = {
    "hsm": _hsm,
    "kmc": _kmc,
    "management": _management,
    "machine": _machine,
    "card": _card,
    "vcm": _vcm,
    "zygote": _zygote,
    "terminal": _terminal,
    "bench-vcm": _bench_vcm,
    "bench-limit": _bench_limit,
    "bench-engine": _bench_engine,
}

if __name__ == "__main__":
    sys.exit(ROLES[sys.argv[1]]())
