"""What a run across hosts needs beside the run: keys and certificates, `shoal server` and `shoal node`.

Importing this package loads nothing; each command is a module of its own.
"""
