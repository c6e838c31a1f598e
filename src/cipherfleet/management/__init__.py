"""The management platform: it decides where virtual cipher machines run, and holds no key.

The process is started with ``process.main``; ``server`` names its routes, ``ring`` is its clock, ``lifecycle`` its hands.
"""
