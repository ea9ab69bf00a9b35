"""The ground floor: errors, writing of files, the flag loader; standard library and yaml only."""

__version__ = "0.1.0"
