"""What happens around a kernel: autograd, running statistics, ranks, recomputation."""
