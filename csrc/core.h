// What the kernels of rows and of columns do alike: a vector's way through the epilogue and back,
// and the results of a pool from its moments.
#pragma once

#include <cmath>

#include "activations.h"
#include "loops.h"
#include "moments.h"

namespace normkit::NORMKIT_ISA {

// What flows through, null where there is none.
template <class S>
struct Pointers {
  const S *x, *residual, *dy, *dtotal, *output;
  S *y, *dx, *dz;
  const uint8_t* mask;
  bool stream;

  explicit Pointers(const Call& c)
      : x(static_cast<const S*>(c.x)),
        residual(static_cast<const S*>(c.residual)),
        dy(static_cast<const S*>(c.dy)),
        dtotal(static_cast<const S*>(c.dtotal)),
        output(static_cast<const S*>(c.output)),
        y(static_cast<S*>(c.y)),
        dx(static_cast<S*>(c.dx)),
        dz(static_cast<S*>(c.dz)),
        mask(c.mask),
        stream(c.stream) {}
};

// What a kernel is compiled for: the epilogue and the mask cost nothing where there are none.
enum Kind { kBare, kActive, kMasked };

template <class S>
struct Compute {
  using T = float;
};
template <>
struct Compute<double> {
  using T = double;
};

template <class S, Kind K>
struct Core {
  using T = typename Compute<S>::T;
  using V = Vec<T>;
  using M = Memory<S>;
  using Affine = Memory<T>;

  template <class P>
  static NORMKIT_INLINE V load_x(const Pointers<S>& p, int64_t at, P part) {
    V x = M::load(p.x + at, part);
    return K == kMasked ? select(p.mask + at, x, part) : x;
  }

  static NORMKIT_INLINE void put(const Pointers<S>& p, S* to, V v, Whole) {
    if (p.stream && reinterpret_cast<uintptr_t>(to) % (V::kLanes * sizeof(S)) == 0)
      M::stream(to, v);
    else
      M::store(to, v, Whole());
  }
  static NORMKIT_INLINE void put(const Pointers<S>&, S* to, V v, Part part) {
    M::store(to, v, part);
  }

  // y from z, the affine's result.
  template <class P>
  static NORMKIT_INLINE void finish(const Pointers<S>& p, Act act, int64_t at, P part, V z) {
    if (p.residual) z = z + M::load(p.residual + at, part);
    if constexpr (K != kBare) z = activate(act, z);
    if constexpr (K == kMasked) z = select(p.mask + at, z, part);
    put(p, p.y + at, z, part);
  }

  // dz = dy * act'(z); z is the affine's result.
  template <class P>
  static NORMKIT_INLINE V start(const Pointers<S>& p, Act act, int64_t at, P part, V z) {
    V g = M::load(p.dy + at, part);
    if constexpr (K == kBare) return g;
    if (p.output)
      z = M::load(p.output + at, part);
    else if (p.residual)
      z = z + M::load(p.residual + at, part);
    g = slope(act, z, g);
    return K == kMasked ? select(p.mask + at, g, part) : g;
  }

  template <class P>
  static NORMKIT_INLINE void write(const Pointers<S>& p, int64_t at, P part, V dx, V dz) {
    if constexpr (K == kMasked) dx = select(p.mask + at, dx, part);
    if (p.dtotal) dx = dx + M::load(p.dtotal + at, part);
    put(p, p.dx + at, dx, part);
    if (p.dz) put(p, p.dz + at, dz, part);
  }

  // x = base + add, for n elements.
  static void add(const Call& c, int64_t at, int64_t n) {
    const S* base = static_cast<const S*>(c.base) + at;
    const S* more = static_cast<const S*>(c.add) + at;
    S* x = const_cast<S*>(static_cast<const S*>(c.x)) + at;
    across<T>(n, [&](int64_t j, auto part) NORMKIT_LAMBDA {
      M::store(x + j, M::load(base + j, part) + M::load(more + j, part), part);
    });
  }

  static double widened(const S* p) {
    return Lanes<T>(M::load(p, Part{1})).a[0];
  }

  // A sum of squares in T that overflowed, or may have vanished where eps doesn't hide that: below
  // `least` an element.
  static NORMKIT_INLINE bool unsafe(double least, double n, double squares) {
    if (sizeof(T) == 8) return false;
    return (!(squares <= 3e38)) | (squares < n * least);
  }
  static double least(const Call& c) { return c.formula.eps < 1e-20 ? 1e-30 : 0; }

  // 1 / n, which is known where nothing is masked.
  static NORMKIT_INLINE double inverse(double n, double whole) {
    if (K != kMasked) return whole;
    return n > 0 ? 1 / n : 0;
  }

  // Sums of d and d² about a mean from which the true one is less than 1.7 standard deviations
  // away: taking n times the square of the rest from the latter costs them two bits at most.
  static NORMKIT_INLINE bool near(double n, double left, double squares) {
    return left * left <= 0.75 * n * squares;
  }

  // The results of `pools` pools from `first` on: all at once, since roots and quotients are slow.
  static void finish_moments(const Call& c, int64_t first, int64_t pools, const double* n,
                             const double* mean, const double* m2) {
    const double whole = n[0] > 0 ? 1 / n[0] : 0, eps = c.formula.eps;
    for (int64_t i = 0; i < pools; ++i) c.mean[first + i] = mean[i];
    if (c.count) {
      for (int64_t i = 0; i < pools; ++i) {
        c.count[first + i] = n[i];
        c.variance[first + i] = m2[i] * inverse(n[i], whole);
      }
      return;
    }
    T *vars = static_cast<T*>(c.var) + first, *rstds = static_cast<T*>(c.rstd) + first;
    for (int64_t i = 0; i < pools; ++i) {
      double var = m2[i] * inverse(n[i], whole);
      vars[i] = static_cast<T>(var);
      rstds[i] = static_cast<T>(1 / std::sqrt(var + eps));
    }
  }
  static void finish_moments(const Call& c, int64_t pool, const Moments& m) {
    finish_moments(c, pool, 1, &m.n, &m.mean, &m.m2);
  }
};

}  // namespace normkit::NORMKIT_ISA
