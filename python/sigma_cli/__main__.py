"""`torchrun -m sigma_cli ARGUMENTS`: `sigma ARGUMENTS` on every rank."""

from sigma_cli import main

main()
