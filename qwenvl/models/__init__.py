"""A name in, a whole model folder out, and what the folder says of itself. Begin with catalog.py; all families are in
families.py.
"""
