"""Command lines, one file a command: they parse words, call the package and turn errors into messages."""
