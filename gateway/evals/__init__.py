"""Evals: runs over data, in the background and across restarts. `runner.py` is the way in."""
