"""Untrusted files, read within limits; and locks of folders that are written to. Begin with bounded_json.py."""
