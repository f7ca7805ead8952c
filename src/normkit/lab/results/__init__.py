"""What runs reported: the store, the measures taken from it, the verdicts."""
