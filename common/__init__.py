"""The ground floor: errors, files, JSON records, the flag loader; standard library and yaml only.

- errors: the one kind of error that users see, and places in files;
- files: how files and directories are written;
- jsonl: how records in JSON are read and written;
- flags: how command lines and configuration files are read, and how a script ends.
"""

__version__ = "0.1.0"
