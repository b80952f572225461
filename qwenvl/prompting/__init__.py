"""A request in, a model's inputs out; tokens in, an answer out. Begin with prompt.py and answer.py."""
