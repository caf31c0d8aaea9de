"""What leaves the trainer: prepared bases, adapters in both forms, and the numbers that prove them."""
