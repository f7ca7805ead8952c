"""One run: its configuration, arm, data, model and training loop."""
