"""`python -m hf_tokenprune` is the command `hf-tokenprune`, for launchers that start modules: torchrun, accelerate launch."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
