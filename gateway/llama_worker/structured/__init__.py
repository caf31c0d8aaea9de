"""Structured outputs: what a reply may look like, held token by token.

    JSON schema ──json_schema──▶ GBNF ──gbnf, rules──▶ rules over bytes ──automaton──▶ states ──constraint──▶ token or not
    regex ────────regex─────────▶ ┘

The grammar language is llama.cpp's GBNF, and what is allowed is what llama.cpp's own grammar sampler allows (a test compares
the two over whole vocabularies). The code is ours because that one cannot be bounded from outside: it looks for left recursion
in time exponential in the rules, aborts the process where a token does not fit, and an ambiguous grammar doubles its work with
each character. Here every step is counted, and a request whose grammar costs too much ends alone.
"""
