"""The llama worker: a process of its own that runs llama.cpp and speaks the engine dialect over loopback.

    http thread                          main thread
    requests ──parse──▶ scheduler.inbox ──▶ admit → prompt chunk → decode steps by adapter → sample
    responses ◀──frames── one hand-over a step ◀──────────────────────────────────────────────┘

Ids in, ids out: it never tokenises. `python -m gateway.llama_worker --help` shows its command line.
"""
