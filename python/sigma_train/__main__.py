"""`torchrun -m sigma_train ARGUMENTS`: `sigma train ARGUMENTS` on every rank."""

import sys

from sigma_cli import main

sys.argv.insert(1, "train")
main()
