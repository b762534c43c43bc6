"""The command line `ferryman`. Needs the extra `cli`."""
