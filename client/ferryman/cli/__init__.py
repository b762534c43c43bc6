"""The command `ferryman`: the SDK at a terminal. Needs the extra `cli`."""
