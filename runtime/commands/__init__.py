"""Bodies of the short commands: configuration, topics, schemas, stack, mappings.

They take settings or paths and give plain data; ``runtime.cli`` parses, prints and exits. The long-running processes
are not here (``runtime.roles``).
"""
