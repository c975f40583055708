"""Command lines, one file per command: they parse words, call the package and turn errors into messages."""
