"""`python -m gradmap_pipeline` is `gradmap`."""

from .cli import main

main()
