"""Questions in, answers of an engine in another process out. Begin with session.py."""
