"""`python -m dinoray.cli`."""

from dinoray.cli import main

main()
