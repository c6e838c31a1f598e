"""Drivers of the platform's ports: what is done on this host, and later on others."""
