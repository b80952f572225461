"""Loading of models: a LoadSpec in, a model on its device out; and unloading. Begin with source.py and cache.py."""
