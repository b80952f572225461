"""Turns a model's name into a complete model folder, and reads what kind of model is in it. Begin with catalog.py;
families.py lists all families.
"""
