"""The commands of the command line. Begin with common.py; python -m qwenvl runs qwenvl/__main__.py."""
