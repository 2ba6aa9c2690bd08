"""The `cotune` command and what it runs."""
