"""Turns files and tensors into pictures and frames of films, and answers into boxes. Begin with media.py."""
