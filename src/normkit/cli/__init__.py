"""The command `normkit`."""
