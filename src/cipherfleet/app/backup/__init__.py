"""Backup and restore of a cloud's state: the databases of KMC and management platform, the HSM's sealed file, the settings.

No CMK and no share of one is in a backup: they are on the Ukeys alone.
"""
