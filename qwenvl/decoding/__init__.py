"""Token generation: a model's inputs in, token ids out, one after the other. Begin with decoder.py."""
