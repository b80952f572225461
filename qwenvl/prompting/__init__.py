"""Prompts: a request in, a model's inputs out. Answers: tokens in, text out. Begin with prompt.py and answer.py."""
