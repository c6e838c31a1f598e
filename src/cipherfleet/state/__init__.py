"""What a process keeps on disk: files that are whole or absent, and a database that survives a power cut."""
