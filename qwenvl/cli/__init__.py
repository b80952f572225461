"""The commands of the command line. Begin with common.py; python -m qwenvl is __main__.py beside this room."""
