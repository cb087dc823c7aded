"""`python -m fastgeo`: the command line."""

from fastgeo.app.cli import main

main()
