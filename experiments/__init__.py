"""The commands, one verb a file: `python -m experiments` lists them."""
