"""The program `cait`: one file a command."""
