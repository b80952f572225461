"""Linear layers for a CPU: weights in the form that this CPU reads fastest, in 16, 8 or 4 bits."""
