"""What the tools and the lab share: errors, loading of user code, the look of a page."""
