"""Messages → ids → messages. Pure: no I/O, no torch, imports nothing else of ours; the trainer imports it too."""
