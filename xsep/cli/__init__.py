"""The command line, ``python -m xsep``."""
