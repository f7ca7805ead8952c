"""Tools for whole models: swap, fold, recalibrate, inspect."""
