"""`python -m trainer.tracking JOB_DIR KIND`: see `follower`."""

from __future__ import annotations

import os
import sys

from trainer.tracking.follower import main

os._exit(main(sys.argv[1:]))  # what a library does at exit may wait for its server: it is not waited for
