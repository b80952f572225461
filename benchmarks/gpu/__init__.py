"""Does every measurement that needs a GPU in one run: __main__.py has the options, lines.py the measurements.

A line is a function with a name (bench.py). Lines run in a worker, a process of its own (worker.py). When one fails,
hangs or leaves the GPU unusable, the worker is ended, a new one takes the next line, and the results say what happened
(runner.py). Neighbours in the list share a worker, and so the model, as long as nothing fails.
"""
