"""What people look at: figures, pages, progress."""
