"""The trainer beside plain TRL, and the phases of a job: `make bench-trainer`."""
