"""Studies of normalization on real data: one runner, one store, one report, one file a study."""
