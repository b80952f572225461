"""Sends questions to an engine in another process, and returns its answers. Begin with session.py."""
