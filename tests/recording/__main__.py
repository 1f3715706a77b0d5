"""Start it."""

from tests.recording import main

main()
