"""Tunegate: the home for code written against the OpenAI API on its owner's own machine."""

__version__ = "0.1.0"
