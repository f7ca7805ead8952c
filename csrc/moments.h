// Count, mean and sum of squares about it, merged block by block.
#pragma once

#include "vec.h"

namespace normkit::NORMKIT_ISA {

struct Moments {
  double n = 0, mean = 0, m2 = 0;

  // Chan's: exact for counts of any size.
  NORMKIT_INLINE void merge(double nb, double mean_b, double m2_b) {
    if (nb == 0) return;
    double total = n + nb, delta = mean_b - mean, share = nb / total;
    m2 += m2_b + delta * delta * n * share;
    mean = n == 0 ? mean_b : mean + delta * share;
    n = total;
  }
  NORMKIT_INLINE void merge(const Moments& other) { merge(other.n, other.mean, other.m2); }
};

}  // namespace normkit::NORMKIT_ISA
