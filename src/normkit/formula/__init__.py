"""What a normalization computes: which elements share statistics, the affine, the checks."""
