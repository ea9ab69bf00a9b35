"""The ground floor, which every room may import; it needs the standard library and yaml alone.

- errors: the one kind of error that users see, and places in files;
- files: how files and directories are written;
- jsonl: how records in JSON are read and written;
- flags: how command lines and configuration files are read, and how a script ends.
"""
