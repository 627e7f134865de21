"""Users of the library, not parts of it: each folder makes one thing with one command."""
