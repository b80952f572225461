"""A LoadSpec in, a model on its device out, and who lets it go. Begin with source.py and cache.py."""
