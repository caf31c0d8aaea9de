"""The llama worker beside llama-server of the same llama.cpp commit and llama-cpp-python's own server: `make bench-llama`."""
