"""The consumer's side: the Ukey, the agent that stands for it, enrolling, and signing applications in.

::

    async with cloud.kmc() as kmc, cloud.management() as management:  # the operator's callers
        await enrol(kmc, management, "acme", Path("ukey"), pin, kmc_url=kmc.url, management_url=management.url)
    with DirectoryUkey.open("ukey", pin) as ukey:
        profile = await sign_in(ukey, "billing", [Right.ENCRYPT, Right.DECRYPT], days=30)
    await Terminal(TerminalConfig("ukey", pin), ready=print, progress=print).run(stop)  # service on until the Ukey goes
"""
