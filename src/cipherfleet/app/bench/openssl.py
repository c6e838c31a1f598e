"""``openssl speed`` as a yardstick."""

import asyncio
import shutil

NAMES = {"aes-256-gcm": "aes-256-gcm", "aes-256-cbc": "aes-256-cbc", "sha-256": "sha256"}


async def version() -> str:
    """Empty when there is no openssl."""
    return (await _said("version")).strip() if shutil.which("openssl") else ""


async def speed(operation: str, size: int) -> float | None:
    """Bytes per second of one processor, measured for a second, which is the least it knows; None when it does not say."""
    return parse(await _said("speed", "-mr", "-seconds", "1", "-bytes", str(size), "-evp", NAMES[operation]))


def parse(text: str) -> float | None:
    """Of the machine-readable output: ``+F:number:name:bytes per second``."""
    for line in text.splitlines():
        fields = line.split(":")
        if fields[0] == "+F" and len(fields) == 4:
            try:
                return float(fields[3])
            except ValueError:
                return None
    return None


async def _said(*arguments: str) -> str:
    process = await asyncio.create_subprocess_exec(
        "openssl", *arguments, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    said, _ = await process.communicate()
    return said.decode(errors="replace")
