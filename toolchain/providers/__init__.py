"""Stand-ins for the official provider plugins, for machines that cannot download those.

Each module is one plugin: the official resource tokens, inputs, outputs, defaults and replacement rules of the types
that the program uses, and nothing more. They do the real work on the real servers.
"""
