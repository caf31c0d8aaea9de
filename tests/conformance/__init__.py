"""`make conformance`: openai-python's own tests, and real programs, against a running gateway."""
