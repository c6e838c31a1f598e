"""The key management center: certification authority and key escrow, on an HSM.

``process`` has the two processes (``hsm_main``, ``kmc_main``); ``server`` names the routes; ``hsm`` is the port to the token.
"""
