// The kernels of one instruction set. Whatever is summed is summed in an order that depends on the
// shape alone, so results are bitwise the same on any number of threads and on AVX2 as on AVX-512:
// work is cut into blocks, a block's sums are merged in double in the order of the blocks, and the
// schedule (which thread, fused or in two phases) changes no bit.
//
// Nothing of the standard library is instantiated here: a template compiled for AVX-512 must not be
// the one that the linker keeps for every machine.
#pragma once

#include <cstdlib>
#include <new>
#include <type_traits>

#include "cuts.h"
#include "vec.h"

namespace normkit::NORMKIT_ISA {

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class F>
void parallel_for(int64_t n, int64_t grain, const F& f) {
  if (n <= grain || n <= 1) {
    if (n > 0) f(0, n);
    streamed();
    return;
  }
  parallel(
      n, grain,
      [](int64_t begin, int64_t end, void* context) {
        (*static_cast<const F*>(context))(begin, end);
        streamed();
      },
      const_cast<void*>(static_cast<const void*>(&f)));
}

template <class T>
class Array {
 public:
  explicit Array(int64_t n) : data_(nullptr) {
    if (n > 0) {
      data_ = static_cast<T*>(std::malloc(static_cast<size_t>(n) * sizeof(T)));
      if (!data_) throw std::bad_alloc();
    }
  }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  ~Array() { std::free(data_); }
  T* get() { return data_; }
  T& operator[](int64_t i) { return data_[i]; }
  void fill(int64_t n, T value) {
    for (int64_t i = 0; i < n; ++i) data_[i] = value;
  }

 private:
  T* data_;
};

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

// The vectors of the 64 bytes at j: whole ones, or what of them lies before n.
template <class T, class F>
NORMKIT_INLINE void step(int slot, int64_t j, F f) {
  NORMKIT_UNROLL
  for (int p = 0; p < kParts; ++p) f(slot * kParts + p, j + p * Vec<T>::kLanes, Whole());
}

// Calls f(slot, j, part) for the vectors of [0, n); the slots are those of a Sum.
template <class T, int Slots = 4, class F>
NORMKIT_INLINE void along(int64_t n, F f) {
  constexpr int64_t lanes = 64 / sizeof(T), each = Vec<T>::kLanes;
  int64_t j = 0;
  if constexpr (Slots == 1) {
    for (; j + lanes <= n; j += lanes) step<T>(0, j, f);
    int slot = 0;
    for (; j + each <= n; j += each) f(slot++, j, Whole());
    if (j < n) f(slot, j, Part{static_cast<int>(n - j)});
    return;
  }
  for (; j + 4 * lanes <= n; j += 4 * lanes) {
    step<T>(0, j, f);
    step<T>(1, j + lanes, f);
    step<T>(2, j + 2 * lanes, f);
    step<T>(3, j + 3 * lanes, f);
  }
  if (j + lanes <= n) {
    step<T>(0, j, f);
    j += lanes;
    if (j + lanes <= n) {
      step<T>(1, j, f);
      j += lanes;
      if (j + lanes <= n) {
        step<T>(2, j, f);
        j += lanes;
      }
    }
  }
  int slot = 3 * kParts;
  for (; j + each <= n; j += each) f(slot++, j, Whole());
  if (j < n) f(slot, j, Part{static_cast<int>(n - j)});
}

template <int N>
struct Several {
  static constexpr int count = N;
};

// As along, for loops that already do several rows at a time.
template <class T, class F>
NORMKIT_INLINE void across(int64_t n, F f) {
  int64_t j = 0;
  for (; j + Vec<T>::kLanes <= n; j += Vec<T>::kLanes) f(j, Whole());
  if (j < n) f(j, Part{static_cast<int>(n - j)});
}

constexpr double kLeakySlope = 0.01;

template <class T>
NORMKIT_APART Vec<T> activate_smoothly(Act act, Vec<T> z) {
  using V = Vec<T>;
  if (act == Act::silu) return z / (V(T(1)) + exp(V(T(0)) - z));
  V cdf, bell;
  normal(z, cdf, bell);
  return z * cdf;
}

template <class T>
NORMKIT_INLINE Vec<T> activate(Act act, Vec<T> z) {
  if (act == Act::none) return z;
  if (act == Act::relu) return where_not_positive(z, Vec<T>(T(0)), z);
  if (act == Act::leaky_relu) return where_not_positive(z, z * Vec<T>(T(kLeakySlope)), z);
  return activate_smoothly(act, z);
}

template <class T>
NORMKIT_APART Vec<T> slope_smoothly(Act act, Vec<T> z, Vec<T> g) {
  using V = Vec<T>;
  if (act == Act::silu) {
    V s = V(T(1)) / (V(T(1)) + exp(V(T(0)) - z));
    return g * s * (V(T(1)) + z * (V(T(1)) - s));
  }
  V cdf, bell;
  normal(z, cdf, bell);
  return g * (cdf + z * bell * V(T(0.398942280401432678)));
}

// g * act'(z); of relu and leaky_relu only the sign of z matters.
template <class T>
NORMKIT_INLINE Vec<T> slope(Act act, Vec<T> z, Vec<T> g) {
  if (act == Act::none) return g;
  if (act == Act::relu) return where_not_positive(z, Vec<T>(T(0)), g);
  if (act == Act::leaky_relu) return where_not_positive(z, g * Vec<T>(T(kLeakySlope)), g);
  return slope_smoothly(act, z, g);
}

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
  static double least(const Call& c) { return c.eps < 1e-20 ? 1e-30 : 0; }

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
    const double whole = n[0] > 0 ? 1 / n[0] : 0, eps = c.eps;
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

// ---- Rows ---------------------------------------------------------------------------------------

template <class S, Kind K>
struct RowKernel : Core<S, K> {
  using Base = Core<S, K>;
  using typename Base::Affine;
  using typename Base::M;
  using typename Base::T;
  using typename Base::V;

  // Runs cut into blocks: pieces of a long run, or several short runs.
  struct Blocks {
    int64_t segments, length, pieces, together, count;

    Blocks(int64_t segments, int64_t length) : segments(segments), length(length) {
      pieces = max(1, ceil_div(length, kBlock));
      together = pieces > 1 ? 1 : max(1, kBlock / max(1, length));
      count = pieces > 1 ? segments * pieces : ceil_div(segments, together);
    }
  };
  struct Block {
    int64_t segment, runs, begin, size;
    NORMKIT_INLINE Block(const Blocks& b, int64_t i) {
      if (b.pieces > 1) {
        segment = b.segments == 1 ? 0 : i / b.pieces;
        runs = 1;
        begin = (i - segment * b.pieces) * kBlock;
      } else {
        segment = i * b.together;
        runs = min(b.together, b.segments - segment);
        begin = 0;
      }
      size = min(kBlock, b.length - begin);
    }
  };

  const Rows g;
  const Call& c;
  const Pointers<S> pointers;
  const T *weights, *biases;
  // Runs that follow each other in memory are one run to the statistics.
  const Blocks statistic, affine;

  RowKernel(const Rows& g, const Call& c)
      : g(g),
        c(c),
        pointers(c),
        weights(static_cast<const T*>(c.weight)),
        biases(static_cast<const T*>(c.bias)),
        statistic(g.segment_stride == g.length ? Blocks(1, g.segments * g.length)
                                               : Blocks(g.segments, g.length)),
        affine(g.segment_step ? 1 : g.segments, g.length) {}

  int64_t offset(int64_t pool, int64_t segment) const {
    int64_t jumped = g.jump ? pool / g.period * g.jump : 0;
    return pool * g.pool_stride + jumped + segment * g.segment_stride;
  }
  int64_t entry(int64_t pool, int64_t segment) const {
    return (pool < g.period ? pool : pool % g.period) * g.pool_step + segment * g.segment_step;
  }

  // x̂ = (x - mean) * rstd - lag of some pools; the lag is what rounding the mean to T left of it.
  struct Standard {
    T mean[kSeveral], rstd[kSeveral], lag[kSeveral];
    Standard(const Call& c, int64_t first, int64_t pools) {
      const double* means = c.mean + first;
      const T* rstds = static_cast<const T*>(c.rstd) + first;
      for (int64_t i = 0; i < pools; ++i) {
        mean[i] = static_cast<T>(means[i]);
        rstd[i] = rstds[i];
        lag[i] = static_cast<T>((means[i] - mean[i]) * rstds[i]);
      }
    }
    NORMKIT_INLINE V standard(int64_t i, V x) const {
      return fma(x - V(mean[i]), V(rstd[i]), -V(lag[i]));
    }
  };

  double count(int64_t at, int64_t n) const {
    if (K != kMasked) return static_cast<double>(n);
    int64_t left = 0;
    for (int64_t j = at; j < at + n; ++j) left += c.mask[j] != 0;
    return static_cast<double>(left);
  }
  double count(int64_t pool, const Block& b) const {
    if (K != kMasked) return static_cast<double>(b.runs * b.size);
    double n = 0;
    for (int64_t s = b.segment; s < b.segment + b.runs; ++s)
      n += count(offset(pool, s) + b.begin, b.size);
    return n;
  }
  double count(int64_t pool) const {
    if (K != kMasked) return static_cast<double>(g.segments * g.length);
    double n = 0;
    for (int64_t i = 0; i < statistic.count; ++i) n += count(pool, Block(statistic, i));
    return n;
  }

  // Of the same block of each pool; each step for all of them before the next, for they are long
  // chains of additions where the block is short. Sums are taken about a provisional mean, that of
  // the block's first elements; where it turns out to be far off, once more about the mean itself.
  // Meanwhile what lies `next` elements on is fetched.
  void moments(int64_t first, int64_t pools, const Block& b, int64_t next, double* n, double* mean,
               double* m2) const {
    T shift[kSeveral], left[kSeveral], squares[kSeveral];
    int64_t from[kSeveral];
    for (int64_t i = 0; i < pools; ++i) from[i] = offset(first + i, b.segment) + b.begin;
    for (int64_t i = 0; i < pools; ++i) n[i] = count(first + i, b);
    if (b.runs == 1 && b.size * static_cast<int64_t>(sizeof(T)) <= kShort)
      about_all<1>(from, pools, 1, b.size, next, shift, left, squares);
    else
      about_all<4>(from, pools, b.runs, b.size, next, shift, left, squares);
    const double whole = 1 / static_cast<double>(b.runs * b.size);
    const double least = Base::least(c);
    const bool center = c.center;
    int64_t bad = 0;
    NORMKIT_INDEPENDENT
    for (int64_t i = 0; i < pools; ++i) {
      const double l = center ? left[i] : T(0), q = squares[i];
      const double rest = l * Base::inverse(n[i], whole);
      bad |= Base::near(n[i], l, q) ? 0 : 1;
      bad |= Base::unsafe(least, n[i], q) ? 1 : 0;
      mean[i] = shift[i] + rest;
      m2[i] = q - l * rest;
    }
    if (bad) moments_anew(first, pools, b, from, n, shift, left, squares, mean, m2);
  }

  // Of those pools whose provisional mean was far off, or whose squares T can't hold.
  NORMKIT_APART void moments_anew(int64_t first, int64_t pools, const Block& b, const int64_t* from,
                                  const double* n, T* shift, T* left, T* squares, double* mean,
                                  double* m2) const {
    const double whole = 1 / static_cast<double>(b.runs * b.size), least = Base::least(c);
    for (int64_t i = 0; i < pools; ++i) {
      const T share = static_cast<T>(Base::inverse(n[i], whole));
      if (c.center && !Base::near(n[i], left[i], squares[i])) {
        T s[Sum<T>::kQuarter], q[Sum<T>::kQuarter];
        shift[i] += left[i] * share;
        about<4>(shift[i], from[i], b.runs, b.size, 0, s, q);
        left[i] = Sum<T>::last(s), squares[i] = Sum<T>::last(q);
        const double rest = left[i] * Base::inverse(n[i], whole);
        mean[i] = shift[i] + rest;
        m2[i] = squares[i] - left[i] * rest;
      }
      if (n[i] > 0 && Base::unsafe(least, n[i], squares[i])) {
        const Moments m = moments_in_double(first + i, b, n[i]);
        mean[i] = m.mean;
        m2[i] = m.m2;
      }
    }
  }

  // Provisional means, and the sums about them.
  template <int Slots>
  NORMKIT_INLINE void about_all(const int64_t* from, int64_t pools, int64_t runs, int64_t size,
                                int64_t next, T* mean, T* left, T* squares) const {
    constexpr int quarter = Sum<T>::kQuarter;
    T s[quarter * kSeveral], q[quarter * kSeveral];
    const int64_t some = min(size, kSome);
    const double share = 1 / static_cast<double>(some);
    for (int64_t i = 0; i < pools; ++i) mean[i] = 0;
    if (c.center) {
      for (int64_t i = 0; i < pools; ++i) sum<Slots>(from[i], some, s + quarter * i);
      for (int64_t i = 0; i < pools; ++i)
        mean[i] = Sum<T>::last(s + quarter * i) *
                  static_cast<T>(Base::inverse(count(from[i], some), share));
    }
    for (int64_t i = 0; i < pools; ++i)
      about<Slots>(mean[i], from[i], runs, size, next, s + quarter * i, q + quarter * i);
    for (int64_t i = 0; i < pools; ++i) {
      left[i] = Sum<T>::last(s + quarter * i);
      squares[i] = Sum<T>::last(q + quarter * i);
    }
  }

  // The sums of d and of d², d = x - mean, over the block at `from`.
  template <int Slots>
  NORMKIT_INLINE void about(T mean, int64_t from, int64_t runs, int64_t size, int64_t next,
                            T* left, T* squares) const {
    const Pointers<S> p = pointers;
    const V shift(mean);
    Sum<T, Slots> s, q;
    int64_t at = from;
    for (int64_t run = 0; run < runs; ++run, at += g.segment_stride)
      along<T, Slots>(size, [&](int slot, int64_t j, auto part) NORMKIT_LAMBDA {
        __builtin_prefetch(p.x + at + j + next);
        V d = keep(M::load(p.x + at + j, part) - shift, part);
        if constexpr (K == kMasked) d = select(p.mask + at + j, d, part);
        s.add(slot, d);
        q.add(slot, d, d);
      });
    s.total(left), q.total(squares);
  }

  template <int Slots>
  NORMKIT_INLINE void sum(int64_t from, int64_t size, T* total) const {
    const Pointers<S> p = pointers;
    Sum<T, Slots> s;
    along<T, Slots>(size, [&](int slot, int64_t j, auto part) NORMKIT_LAMBDA {
      s.add(slot, Base::load_x(p, from + j, part));
    });
    s.total(total);
  }

  // How far on in memory the block after a pool's i-th begins, that of the next pool after the last.
  int64_t next(const Blocks& blocks, int64_t pool, int64_t i) const {
    const bool last = i + 1 == blocks.count;
    const Block b(blocks, i), after(blocks, last ? 0 : i + 1);
    return offset(last ? pool + 1 : pool, after.segment) + after.begin -
           offset(pool, b.segment) - b.begin;
  }

  Moments moments(int64_t pool, int64_t i) const {
    Moments m;
    moments(pool, 1, Block(statistic, i), next(statistic, pool, i), &m.n, &m.mean, &m.m2);
    return m;
  }

  __attribute__((noinline)) Moments moments_in_double(int64_t pool, const Block& b,
                                                      double n) const {
    Moments m;
    m.n = n;
    for (int pass = c.center ? 0 : 1; pass < 2; ++pass) {
      double total = 0;
      for (int64_t s = b.segment; s < b.segment + b.runs; ++s) {
        int64_t at = offset(pool, s) + b.begin;
        for (int64_t j = at; j < at + b.size; ++j) {
          if (c.mask && !c.mask[j]) continue;
          double d = Base::widened(pointers.x + j) - m.mean;
          total += pass ? d * d : d;
        }
      }
      (pass ? m.m2 : m.mean) = pass ? total : total / n;
    }
    return m;
  }

  // y = act((x - mean) * scale + shift + residual) of what lies side by side.
  NORMKIT_INLINE void line(int64_t at, int64_t size, T mean, T scale, T shift) const {
    const Pointers<S> p = pointers;
    const Act act = c.act;
    const V middle(mean), factor(scale), addend(shift);
    across<T>(size, [&](int64_t j, auto part) NORMKIT_LAMBDA {
      V z = fma(M::load(p.x + at + j, part) - middle, factor, addend);
      Base::finish(p, act, at + j, part, z);
    });
  }

  // y over [begin, begin + size) of some segments; its affine is a scalar of each.
  void apply(int64_t pool, int64_t segment, int64_t segments, int64_t begin, int64_t size) const {
    const Standard st(c, pool, 1);
    int64_t at = offset(pool, segment) + begin, e = entry(pool, segment);
    for (int64_t s = 0; s < segments; ++s, at += g.segment_stride, e += g.segment_step)
      line(at, size, st.mean[0], st.rstd[0] * weights[e], biases[e] - st.lag[0] * weights[e]);
  }

  // Given statistics leave every run to itself: in the order of memory, whatever its pool.
  void apply_given() const {
    Array<T> mean(g.pools), scale(g.pools), shift(g.pools);
    for (int64_t p = 0; p < g.pools; ++p) {
      const Standard st(c, p, 1);
      const T w = weights[entry(p, 0)];
      mean[p] = st.mean[0], scale[p] = st.rstd[0] * w;
      shift[p] = biases[entry(p, 0)] - st.lag[0] * w;
    }
    const int64_t each = max(1, ceil_div(g.length, kBlock));
    const int64_t grain = max(1, kGrain / min(kBlock, max(1, g.length)));
    parallel_for(g.segments * g.pools * each, grain, [&](int64_t begin, int64_t end) {
      int64_t pool = begin / each % g.pools, segment = begin / each / g.pools;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t from = each == 1 ? 0 : i % each * kBlock;
        line(offset(pool, segment) + from, min(kBlock, g.length - from), mean[pool], scale[pool],
             shift[pool]);
        if (each > 1 && (i + 1) % each > 0) continue;
        if (++pool == g.pools) pool = 0, ++segment;
      }
    });
  }

  // y of some pools that share a vector affine.
  template <class N>
  void apply_rows(N, int64_t pool, const Standard& st, int64_t of, int64_t begin,
                  int64_t size) const {
    const Pointers<S> p = pointers;
    const Act act = c.act;
    const int64_t at = offset(pool, 0) + begin, e = entry(pool, 0) + begin;
    const T *w = weights + e, *b = biases + e;
    V mean[N::count], rstd[N::count], lag[N::count];
    NORMKIT_UNROLL
    for (int i = 0; i < N::count; ++i)
      mean[i] = V(st.mean[of + i]), rstd[i] = V(st.rstd[of + i]), lag[i] = V(st.lag[of + i]);
    across<T>(size, [&](int64_t j, auto part) NORMKIT_LAMBDA {
      const V wj = Affine::load(w + j, part), bj = Affine::load(b + j, part);
      NORMKIT_UNROLL
      for (int i = 0; i < N::count; ++i) {
        const int64_t k = at + i * g.pool_stride + j;
        V x = fma(M::load(p.x + k, part) - mean[i], rstd[i], -lag[i]);
        Base::finish(p, act, k, part, fma(x, wj, bj));
      }
    });
  }

  // y of some whole pools.
  void apply(int64_t first, int64_t pools) const {
    if (!g.vector_affine) {
      for (int64_t p = first; p < first + pools; ++p) apply(p, 0, g.segments, 0, g.length);
      return;
    }
    const Standard st(c, first, pools);
    int64_t i = 0;
    // Of two rows with the same entries, these are read once.
    for (; g.period == 1 && i + 2 <= pools; i += 2)
      apply_rows(Several<2>(), first + i, st, i, 0, g.length);
    for (; i < pools; ++i) apply_rows(Several<1>(), first + i, st, i, 0, g.length);
  }

  bool fused() const {
    return g.pools >= 4 * threads() || g.pools * g.segments * g.length <= kGrain;
  }
  int64_t pool_grain() const { return max(1, kGrain / max(1, g.segments * g.length)); }

  void forward() const {
    if (c.given && !g.vector_affine && g.segment_step == 0) {
      apply_given();
      return;
    }
    if (fused()) {
      parallel_for(g.pools, pool_grain(), [&](int64_t begin, int64_t end) {
        const int64_t several = max(1, min(kSeveral, kBlock / max(1, g.segments * g.length)));
        double n[kSeveral], mean[kSeveral], m2[kSeveral];
        for (int64_t first = begin; first < end; first += several) {
          const int64_t pools = min(several, end - first);
          if (c.add)
            for (int64_t p = first; p < first + pools; ++p)
              for (int64_t s = 0; s < g.segments; ++s) Base::add(c, offset(p, s), g.length);
          if (!c.given && pools > 1) {
            moments(first, pools, Block(statistic, 0), pools * g.pool_stride, n, mean, m2);
            Base::finish_moments(c, first, pools, n, mean, m2);
          } else if (!c.given) {
            Moments m = moments(first, 0);
            for (int64_t k = 1; k < statistic.count; ++k) m.merge(moments(first, k));
            Base::finish_moments(c, first, m);
          }
          if (c.y) apply(first, pools);
        }
      });
      return;
    }
    if (c.add)
      pieces([&](int64_t p, int64_t s, int64_t begin, int64_t size) {
        Base::add(c, offset(p, s) + begin, size);
      });
    if (!c.given) {
      int64_t each = statistic.count;
      Array<Moments> parts(g.pools * each);
      parallel_for(g.pools * each, max(1, kGrain / kBlock), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
          parts[i] = moments(i / each, i % each);
      });
      for (int64_t p = 0; p < g.pools; ++p) {
        Moments m = parts[p * each];
        for (int64_t i = 1; i < each; ++i) m.merge(parts[p * each + i]);
        Base::finish_moments(c, p, m);
      }
    }
    if (!c.y) return;
    pieces([&](int64_t p, int64_t s, int64_t begin, int64_t size) {
      if (g.vector_affine)
        apply_rows(Several<1>(), p, Standard(c, p, 1), 0, begin, size);
      else
        apply(p, s, 1, begin, size);
    });
  }

  // Every element once, in parallel, in pieces of a run.
  template <class F>
  void pieces(F f) const {
    int64_t each = max(1, ceil_div(g.length, kBlock)), n = g.pools * g.segments * each;
    parallel_for(n, max(1, kGrain / min(kBlock, max(1, g.length))),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t i = begin; i < end; ++i) {
                     int64_t run = i / each, from = i % each * kBlock;
                     f(run / g.segments, run % g.segments, from, min(kBlock, g.length - from));
                   }
                 });
  }

  // ---- backward

  struct Sums {
    double dz, dzx;
    Sums(double dz = 0, double dzx = 0) : dz(dz), dzx(dzx) {}
    void operator+=(const Sums& other) {
      dz += other.dz;
      dzx += other.dzx;
    }
  };

  // Over a block: the sums of dz and dz * x̂, of a scalar affine.
  Sums sums(int64_t pool, const Block& block) const {
    const Pointers<S> p = pointers;
    const Standard st(c, pool, 1);
    const Act act = c.act;
    int64_t at = offset(pool, block.segment) + block.begin, e = entry(pool, block.segment);
    Sum<T> s, q;
    const V mean(st.mean[0]), rstd(st.rstd[0]), scale(st.rstd[0] * weights[e]);
    const V shift(biases[e] - st.lag[0] * weights[e]);
    for (int64_t i = 0; i < block.runs; ++i, at += g.segment_stride)
      along<T>(block.size, [&](int slot, int64_t j, auto part) NORMKIT_LAMBDA {
        V d = keep(Base::load_x(p, at + j, part) - mean, part);
        V dz = Base::start(p, act, at + j, part, fma(d, scale, shift));
        s.add(slot, dz);
        q.add(slot, dz, d * rstd);
      });
    const double total = s.total();
    return Sums(total, q.total() - st.lag[0] * total);
  }

  // Over a block: the sums of g and g * x̂, g = dz * weight, of a vector affine.
  NORMKIT_INLINE Sums sums_of_row(int64_t pool, const Standard& st, int64_t of,
                                  const Block& block) const {
    const Pointers<S> p = pointers;
    const Act act = c.act;
    const int64_t at = offset(pool, 0) + block.begin, e = entry(pool, 0) + block.begin;
    const T *w = weights + e, *b = biases + e;
    Sum<T> s, q;
    along<T>(block.size, [&](int slot, int64_t j, auto part) NORMKIT_LAMBDA {
      V x = keep(st.standard(of, Base::load_x(p, at + j, part)), part);
      V wj = Affine::load(w + j, part);
      V z = K == kBare ? x : fma(x, wj, Affine::load(b + j, part));
      V g = Base::start(p, act, at + j, part, z) * wj;
      s.add(slot, g);
      q.add(slot, g, x);
    });
    return Sums(s.total(), q.total());
  }

  // dx = (dz * weight - <g> - x̂ <g x̂>) * rstd.
  void gradient(int64_t pool, int64_t segment, int64_t segments, int64_t begin, int64_t size,
                Sums mean) const {
    const Pointers<S> p = pointers;
    const Standard st(c, pool, 1);
    const Act act = c.act;
    const double steeply = mean.dzx * st.rstd[0];
    int64_t at = offset(pool, segment) + begin, e = entry(pool, segment);
    const V center(st.mean[0]), rstd(st.rstd[0]), steep(static_cast<T>(steeply));
    const V flat(static_cast<T>(mean.dz * st.rstd[0] - st.lag[0] * steeply));
    for (int64_t s = 0; s < segments; ++s, at += g.segment_stride, e += g.segment_step) {
      const V scale(st.rstd[0] * weights[e]), shift(biases[e] - st.lag[0] * weights[e]);
      across<T>(size, [&](int64_t j, auto part) NORMKIT_LAMBDA {
        V d = Base::load_x(p, at + j, part) - center;
        V dz = Base::start(p, act, at + j, part, fma(d, scale, shift));
        Base::write(p, at + j, part, fma(d * rstd, -steep, fma(dz, scale, -flat)), dz);
      });
    }
  }

  Sums mean_of(int64_t pool, Sums total) const {
    if (c.given) return c.flat ? Sums(c.flat[pool], c.steep[pool]) : Sums();
    double n = count(pool);
    if (n == 0) return Sums();
    return Sums(c.center ? total.dz / n : 0, total.dzx / n);
  }

  void backward() const {
    if (g.vector_affine) {
      backward_vector();
      return;
    }
    // Segments with one affine share their blocks; those with their own are summed each by itself.
    const int64_t kinds = g.segment_step ? g.segments : 1, each = affine.count;
    const bool wants = c.dweight != nullptr, summing = wants || !c.given;
    auto kind_sums = [&](int64_t pool, int64_t kind, int64_t i) {
      Block b(affine, i);
      b.segment += kind;
      return sums(pool, b);
    };
    auto mean = [&](int64_t pool, const Sums* of_kinds) {
      Sums total;
      for (int64_t k = 0; k < kinds; ++k) {
        double w = weights[entry(pool, k)];
        total += Sums(w * of_kinds[k].dz, w * of_kinds[k].dzx);
      }
      return mean_of(pool, total);
    };
    Array<Sums> parts(g.pools * kinds);
    parts.fill(g.pools * kinds, Sums());
    if (fused()) {
      parallel_for(g.pools, pool_grain(), [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p) {
          Sums* mine = &parts[p * kinds];
          if (summing)
            for (int64_t k = 0; k < kinds; ++k)
              for (int64_t i = 0; i < each; ++i) mine[k] += kind_sums(p, k, i);
          if (c.dx) gradient(p, 0, g.segments, 0, g.length, mean(p, mine));
        }
      });
    } else {
      const int64_t per_pool = kinds * each;
      Array<Sums> small(g.pools * per_pool), means(g.pools);
      if (summing)
        parallel_for(g.pools * per_pool, max(1, kGrain / kBlock), [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i)
            small[i] = kind_sums(i / per_pool, i % per_pool / each, i % each);
        });
      for (int64_t p = 0; p < g.pools; ++p) {
        if (summing)
          for (int64_t i = 0; i < per_pool; ++i) parts[p * kinds + i / each] += small[p * per_pool + i];
        means[p] = mean(p, &parts[p * kinds]);
      }
      if (c.dx)
        pieces([&](int64_t p, int64_t s, int64_t begin, int64_t size) {
          gradient(p, s, 1, begin, size, means[p]);
        });
    }
    if (!wants) return;
    parallel_for(g.period, max(1, kGrain / max(1, g.pools / g.period * kinds)),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t q = begin; q < end; ++q)
                     for (int64_t k = 0; k < kinds; ++k) {
                       Sums total;
                       for (int64_t p = q; p < g.pools; p += g.period)
                         total += parts[p * kinds + k];
                       c.dweight[entry(q, k)] = total.dzx;
                       c.dbias[entry(q, k)] = total.dz;
                     }
                 });
  }

  // dx of some pools that share a vector affine; dw and db, where given, are added to.
  template <class N>
  void gradient_of_rows(N, int64_t pool, const Standard& st, int64_t of, const T* flats,
                        const T* steeps, T* dw, T* db) const {
    constexpr int many = N::count;
    const Pointers<S> p = pointers;
    const Act act = c.act;
    V mean[many], rstd[many], lag[many], flat[many], steep[many];
    NORMKIT_UNROLL
    for (int i = 0; i < many; ++i) {
      mean[i] = V(st.mean[of + i]), rstd[i] = V(st.rstd[of + i]), lag[i] = V(st.lag[of + i]);
      flat[i] = V(flats[of + i]), steep[i] = V(steeps[of + i]);
    }
    const int64_t at = offset(pool, 0), e = entry(pool, 0);
    const T *w = weights + e, *b = biases + e;
    across<T>(g.length, [&](int64_t j, auto part) NORMKIT_LAMBDA {
      const V wj = Affine::load(w + j, part), bj = Affine::load(b + j, part);
      V dweight(T(0)), dbias(T(0));
      NORMKIT_UNROLL
      for (int i = 0; i < many; ++i) {
        const int64_t k = at + i * g.pool_stride + j;
        V x = fma(Base::load_x(p, k, part) - mean[i], rstd[i], -lag[i]);
        V dz = Base::start(p, act, k, part, K == kBare ? x : fma(x, wj, bj));
        dweight = fma(dz, x, dweight);
        dbias = dbias + dz;
        Base::write(p, k, part, fma(x, -steep[i], fma(dz * wj, rstd[i], -flat[i])), dz);
      }
      if (!dw) return;
      Affine::store(dw + j, Affine::load(dw + j, part) + dweight, part);
      Affine::store(db + j, Affine::load(db + j, part) + dbias, part);
    });
  }

  // Chunks of rows, each with its own sums for weight and bias, whatever the number of threads.
  void backward_vector() const {
    const int64_t entries = g.period * g.length;
    const int64_t least = max(kChunkRows, ceil_div(g.pools, kChunks));
    const int64_t rows = ceil_div(least, g.period) * g.period, chunks = ceil_div(g.pools, rows);
    const int64_t several = max(2, min(kSeveral, kBlock / max(1, g.length)));
    const bool wants = c.dweight != nullptr;
    const double whole = 1 / static_cast<double>(max(1, g.length));
    Array<T> parts(wants ? 2 * chunks * entries : 0);
    parallel_for(chunks, max(1, kGrain / max(1, rows * g.length)), [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        T* dw = wants ? &parts[2 * chunk * entries] : nullptr;
        if (wants)
          for (int64_t i = 0; i < 2 * entries; ++i) dw[i] = 0;
        const int64_t last = min(g.pools, (chunk + 1) * rows);
        for (int64_t first = chunk * rows; first < last; first += several) {
          const int64_t pools = min(several, last - first);
          const Standard st(c, first, pools);
          // <g> and <g x̂>, times rstd.
          T flat[kSeveral], steep[kSeveral];
          Sums totals[kSeveral];
          for (int64_t i = 0; i < pools; ++i)
            for (int64_t k = 0; k < affine.count && !c.given; ++k)
              totals[i] += sums_of_row(first + i, st, i, Block(affine, k));
          for (int64_t i = 0; i < pools; ++i) {
            const double share = Base::inverse(count(first + i), whole) * st.rstd[i];
            flat[i] = c.center ? static_cast<T>(totals[i].dz * share) : T(0);
            steep[i] = static_cast<T>(totals[i].dzx * share);
          }
          int64_t i = 0;
          auto gradients = [&](auto many) {
            T* mine = wants ? dw + entry(first + i, 0) : nullptr;
            gradient_of_rows(many, first + i, st, i, flat, steep, mine,
                             mine ? mine + entries : nullptr);
            i += many.count;
          };
          // Of two rows with the same entries, these are read and written once.
          while (g.period == 1 && i + 2 <= pools) gradients(Several<2>());
          while (i < pools) gradients(Several<1>());
        }
      }
    });
    if (!wants) return;
    parallel_for(entries, max(1, kGrain / chunks), [&](int64_t begin, int64_t end) {
      for (int64_t e = begin; e < end; ++e) c.dweight[e] = c.dbias[e] = 0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const T* dw = &parts[2 * chunk * entries];
        for (int64_t e = begin; e < end; ++e) {
          c.dweight[e] += dw[e];
          c.dbias[e] += dw[entries + e];
        }
      }
    });
  }
};

// ---- Columns ------------------------------------------------------------------------------------

// ByRow: the affine is one of each row.
template <class S, Kind K, bool ByRow>
struct ColumnKernel : Core<S, K> {
  using Base = Core<S, K>;
  using typename Base::Affine;
  using typename Base::M;
  using typename Base::T;
  using typename Base::V;

  // A tile's columns of one matrix, cut into blocks of rows.
  struct Unit {
    int64_t outer, begin, width;
  };

  const Columns g;
  const Call& c;
  const Pointers<S> pointers;
  int64_t tile, tiles, block_rows, blocks;

  ColumnKernel(const Columns& g, const Call& c) : g(g), c(c), pointers(c) {
    tile = g.group;
    while (tile < kTile) tile *= 2;
    if (ByRow) tile = max(64, min(kTile, kTileElements / max(1, g.rows) / 64 * 64));
    tile = max(1, min(tile, g.columns));
    tiles = ceil_div(g.columns, tile);
    block_rows = max(8, min(kTileRows, kTileElements / tile / 4 * 4));
    blocks = max(1, ceil_div(g.rows, block_rows));
  }

  Unit unit(int64_t i) const {
    int64_t begin = i % tiles * tile;
    return {i / tiles, begin, min(tile, g.columns - begin)};
  }
  int64_t offset(const Unit& u, int64_t row) const {
    return (u.outer * g.rows + row) * g.columns + u.begin;
  }
  int64_t pools_of(const Unit& u) const { return u.width / g.group; }
  int64_t first_pool(const Unit& u) const { return (u.outer * g.columns + u.begin) / g.group; }

  // Calls f(rows, first row) for the rows of a block, four at a time, then one by one.
  template <class F>
  NORMKIT_INLINE void rows_of(int64_t block, F f) const {
    int64_t r = block * block_rows, end = min(g.rows, r + block_rows);
    for (; r + 4 <= end; r += 4) f(Several<4>(), r);
    for (; r < end; ++r) f(Several<1>(), r);
  }

  // Fetches the rows after next in the order of memory, which is what the processor's own fetching
  // follows, while several rows are gone through side by side, which it doesn't follow. Of tiles
  // that are a part of the rows nothing is gained.
  struct Fetch {
    const S* at;
    const int64_t step;

    Fetch(const ColumnKernel& k, const Unit& u, const S* from, int64_t row)
        : at(from + k.offset(u, row + kAhead)), step(u.width == k.g.columns ? 1 : 0) {}
    template <class N>
    NORMKIT_INLINE void advance(N) {
      constexpr int line = 64 / sizeof(S), lines = N::count * V::kLanes / line;
      NORMKIT_UNROLL
      for (int i = 0; i < lines; ++i) __builtin_prefetch(at + i * line);
      at += step * lines * line;
    }
  };

  // What a unit's columns need, expanded from pools and affine entries: a value a column.
  struct Expanded {
    Array<T> mean, lag, rstd, scale, shift;
    Expanded(const ColumnKernel& k, const Unit& u)
        : mean(u.width), lag(u.width), rstd(u.width), scale(u.width), shift(u.width) {
      const Columns& g = k.g;
      const Call& c = k.c;
      auto take = [&](int64_t j, int64_t pool) {
        mean[j] = static_cast<T>(c.mean[pool]);
        rstd[j] = static_cast<T*>(c.rstd)[pool];
        lag[j] = c.center ? static_cast<T>((c.mean[pool] - mean[j]) * rstd[j]) : T(0);
      };
      auto shape = [&](int64_t j, int64_t e) {
        scale[j] = rstd[j] * k.weight(e);
        shift[j] = k.bias(e) - lag[j] * k.weight(e);
      };
      int64_t first = k.first_pool(u);
      if (g.group == 1)
        for (int64_t j = 0; j < u.width; ++j) take(j, first + j);
      else
        for (int64_t j = 0; j < u.width; ++j) take(j, first + j / g.group);
      if (ByRow) return;
      if (g.repeat == 1)
        for (int64_t j = 0; j < u.width; ++j) shape(j, u.begin + j);
      else
        for (int64_t j = 0; j < u.width; ++j) shape(j, (u.begin + j) / g.repeat);
    }
  };

  // Count, mean and M2 a column.
  struct ColumnMoments {
    Array<double> n, mean, m2;
    explicit ColumnMoments(int64_t width) : n(width), mean(width), m2(width) {}
  };

  // Provisional means: each column's over some rows; with a mask, over what it leaves of them.
  void means_of_rows(const Unit& u, int64_t first, int64_t last, T* m) const {
    const Pointers<S> p = pointers;
    const int64_t w = u.width;
    for (int64_t r = first; r < last; ++r) {
      const int64_t at = offset(u, r);
      across<T>(w, [&](int64_t j, auto part) NORMKIT_LAMBDA {
        Affine::store(m + j, Affine::load(m + j, part) + Base::load_x(p, at + j, part), part);
      });
    }
    if (K != kMasked) {
      const T share = static_cast<T>(1 / static_cast<double>(last - first));
      for (int64_t j = 0; j < w; ++j) m[j] *= share;
      return;
    }
    for (int64_t j = 0; j < w; ++j) {
      int64_t n = 0;
      for (int64_t r = first; r < last; ++r) n += p.mask[offset(u, r) + j] != 0;
      m[j] = n > 0 ? m[j] / static_cast<T>(n) : T(0);
    }
  }

  void moments(const Unit& u, int64_t block, double* n, double* mean, double* m2) const {
    const Pointers<S> p = pointers;
    int64_t w = u.width, first = block * block_rows, last = min(g.rows, first + block_rows);
    if (c.add)
      for (int64_t r = first; r < last; ++r) Base::add(c, offset(u, r), w);
    Array<T> s(w), m(w), q(w);
    const double whole = 1 / static_cast<double>(last - first);
    for (int64_t j = 0; j < w; ++j) n[j] = static_cast<double>(last - first);
    if (c.mask) {
      for (int64_t j = 0; j < w; ++j) n[j] = 0;
      for (int64_t r = first; r < last; ++r) {
        const uint8_t* mask = c.mask + offset(u, r);
        for (int64_t j = 0; j < w; ++j) n[j] += mask[j] != 0;
      }
    }
    // About provisional means, those of the first rows, or of all rows where some are far off.
    m.fill(w, 0);
    if (c.center) means_of_rows(u, first, min(last, first + kSomeRows), m.get());
    for (int pass = 0;; ++pass) {
      s.fill(w, 0);
      q.fill(w, 0);
      rows_of(block, [&](auto many, int64_t r) {
        const int64_t at = offset(u, r);
        Fetch x(*this, u, p.x, r);
        across<T>(w, [&](int64_t j, auto part) NORMKIT_LAMBDA {
          x.advance(many);
          V mean_j = Affine::load(&m[j], part);
          V left(T(0)), squares(T(0));
          NORMKIT_UNROLL
          for (int i = 0; i < many.count; ++i) {
            V d = M::load(p.x + at + i * g.columns + j, part) - mean_j;
            if constexpr (K == kMasked) d = select(p.mask + at + i * g.columns + j, d, part);
            left = left + d;
            squares = fma(d, d, squares);
          }
          Affine::store(&s[j], Affine::load(&s[j], part) + left, part);
          Affine::store(&q[j], Affine::load(&q[j], part) + squares, part);
        });
      });
      if (pass || !c.center) break;
      bool all_near = true;
      for (int64_t j = 0; j < w; ++j) all_near &= Base::near(n[j], s[j], q[j]);
      if (all_near) break;
      for (int64_t j = 0; j < w; ++j)
        if (!Base::near(n[j], s[j], q[j])) m[j] += s[j] * static_cast<T>(Base::inverse(n[j], whole));
    }
    const double least = Base::least(c);
    bool safe = true;
    for (int64_t j = 0; j < w; ++j) {
      double left = c.center ? s[j] : T(0), rest = left * Base::inverse(n[j], whole);
      mean[j] = m[j] + rest;
      m2[j] = q[j] - left * rest;
      safe &= !Base::unsafe(least, n[j], q[j]);
    }
    if (safe) return;
    for (int64_t j = 0; j < w; ++j) {
      if (!Base::unsafe(least, n[j], q[j]) || n[j] == 0) continue;
      mean[j] = 0;
      for (int pass = c.center ? 0 : 1; pass < 2; ++pass) {
        double total = 0;
        for (int64_t r = first; r < last; ++r) {
          int64_t at = offset(u, r) + j;
          if (c.mask && !c.mask[at]) continue;
          double d = Base::widened(pointers.x + at) - mean[j];
          total += pass ? d * d : d;
        }
        (pass ? m2 : mean)[j] = pass ? total : total / n[j];
      }
    }
  }

  static void merge(ColumnMoments& all, int64_t begin, int64_t end, const double* n,
                    const double* mean, const double* m2) {
    if (begin == end) return;
    const double whole = 1 / (all.n[begin] + n[begin]);
    for (int64_t j = begin; j < end; ++j) {
      double total = all.n[j] + n[j], share = n[j] * Base::inverse(total, whole);
      double delta = mean[j] - all.mean[j], moved = all.mean[j] + delta * share;
      all.m2[j] += m2[j] + delta * delta * all.n[j] * share;
      all.mean[j] = all.n[j] > 0 ? moved : mean[j];
      all.n[j] = total;
    }
  }

  void finish(const Unit& u, ColumnMoments& all) const {
    int64_t first = first_pool(u);
    if (g.group > 1) {
      for (int64_t p = 0; p < pools_of(u); ++p) {
        // All columns at once: their mean, then their spread about it.
        const int64_t begin = p * g.group, end = begin + g.group;
        double n = 0, total = 0, m2 = 0;
        for (int64_t j = begin; j < end; ++j) {
          n += all.n[j];
          total += all.n[j] * all.mean[j];
        }
        const double mean = n > 0 ? total / n : 0;
        for (int64_t j = begin; j < end; ++j) {
          double d = all.mean[j] - mean;
          m2 += all.m2[j] + all.n[j] * d * d;
        }
        Moments m;
        m.n = n;
        m.mean = mean;
        m.m2 = m2;
        Base::finish_moments(c, first + p, m);
      }
      return;
    }
    Base::finish_moments(c, first, u.width, all.n.get(), all.mean.get(), all.m2.get());
  }

  void apply(const Unit& u, Expanded& st, int64_t block) const {
    const Pointers<S> p = pointers;
    const Act act = c.act;
    rows_of(block, [&](auto many, int64_t r) {
      const int64_t at = offset(u, r);
      Fetch x(*this, u, p.x, r), residual(*this, u, p.residual, r);
      across<T>(u.width, [&](int64_t j, auto part) NORMKIT_LAMBDA {
        x.advance(many);
        if (p.residual) residual.advance(many);
        V mean = Affine::load(&st.mean[j], part);
        if constexpr (ByRow) {
          V rstd = Affine::load(&st.rstd[j], part), lag = Affine::load(&st.lag[j], part);
          NORMKIT_UNROLL
          for (int i = 0; i < many.count; ++i) {
            int64_t k = at + i * g.columns + j;
            V standard = fma(M::load(p.x + k, part) - mean, rstd, -lag);
            V z = fma(standard, V(weight(r + i)), V(bias(r + i)));
            Base::finish(p, act, k, part, z);
          }
        } else {
          V scale = Affine::load(&st.scale[j], part), shift = Affine::load(&st.shift[j], part);
          NORMKIT_UNROLL
          for (int i = 0; i < many.count; ++i) {
            int64_t k = at + i * g.columns + j;
            V z = fma(M::load(p.x + k, part) - mean, scale, shift);
            Base::finish(p, act, k, part, z);
          }
        }
      });
    });
  }
  T weight(int64_t row) const { return static_cast<const T*>(c.weight)[row]; }
  T bias(int64_t row) const { return static_cast<const T*>(c.bias)[row]; }

  // Units side by side where there are enough of them, else their blocks, in phases.
  bool fused() const {
    int64_t units = g.outer * tiles;
    return units >= 4 * threads() || units * blocks == 1 ||
           g.outer * g.rows * g.columns <= kGrain;
  }

  void forward() const {
    int64_t units = g.outer * tiles, unit_size = max(1, g.rows * tile);
    if (fused()) {
      parallel_for(units, max(1, kGrain / unit_size), [&](int64_t begin, int64_t end) {
        ColumnMoments all(tile), part(blocks > 1 ? tile : 0);
        for (int64_t i = begin; i < end; ++i) {
          Unit u = unit(i);
          if (!c.given) {
            moments(u, 0, all.n.get(), all.mean.get(), all.m2.get());
            for (int64_t b = 1; b < blocks; ++b) {
              moments(u, b, part.n.get(), part.mean.get(), part.m2.get());
              merge(all, 0, u.width, part.n.get(), part.mean.get(), part.m2.get());
            }
            finish(u, all);
          }
          if (!c.y) continue;
          Expanded st(*this, u);
          for (int64_t b = 0; b < blocks; ++b) apply(u, st, b);
        }
      });
      return;
    }
    int64_t grain = max(1, kGrain / max(1, min(g.rows, block_rows) * tile));
    for (int64_t i = 0; i < units; ++i) {
      Unit u = unit(i);
      if (!c.given) {
        int64_t w = u.width;
        Array<double> parts(3 * blocks * w);
        parallel_for(blocks, grain, [&](int64_t begin, int64_t end) {
          for (int64_t b = begin; b < end; ++b) {
            double* p = &parts[3 * b * w];
            moments(u, b, p, p + w, p + 2 * w);
          }
        });
        ColumnMoments all(w);
        parallel_for(w, max(16, kGrain / blocks), [&](int64_t begin, int64_t end) {
          for (int64_t j = begin; j < end; ++j)
            all.n[j] = parts[j], all.mean[j] = parts[w + j], all.m2[j] = parts[2 * w + j];
          for (int64_t b = 1; b < blocks; ++b) {
            const double* p = &parts[3 * b * w];
            merge(all, begin, end, p, p + w, p + 2 * w);
          }
        });
        finish(u, all);
      }
      if (!c.y) continue;
      Expanded st(*this, u);
      // Last blocks first: they are the likeliest to be still in cache.
      parallel_for(blocks, grain, [&](int64_t begin, int64_t end) {
        for (int64_t b = end - 1; b >= begin; --b) apply(u, st, b);
      });
    }
  }

  // ---- backward

  // A column's sums of g and g * x̂ over a block; g = dz, weighted where the affine is a row's.
  void sums(const Unit& u, Expanded& st, int64_t block, double* dz, double* dzx) const {
    const Pointers<S> p = pointers;
    const Act act = c.act;
    const int64_t columns = g.columns;
    Array<T> s(u.width), q(u.width);
    s.fill(u.width, 0);
    q.fill(u.width, 0);
    rows_of(block, [&](auto many, int64_t r) {
      const int64_t at = offset(u, r);
      Fetch x_ahead(*this, u, p.x, r), dy_ahead(*this, u, p.dy, r);
      across<T>(u.width, [&](int64_t j, auto part) NORMKIT_LAMBDA {
        x_ahead.advance(many), dy_ahead.advance(many);
        const Operands o(st, j, part);
        V left(T(0)), right(T(0));
        NORMKIT_UNROLL
        for (int i = 0; i < many.count; ++i) {
          V x, dz = point(p, act, o, r + i, at + i * columns + j, part, x);
          if constexpr (ByRow) dz = dz * V(weight(r + i));
          left = left + dz;
          right = fma(dz, x, right);
        }
        Affine::store(&s[j], Affine::load(&s[j], part) + left, part);
        Affine::store(&q[j], Affine::load(&q[j], part) + right, part);
      });
    });
    for (int64_t j = 0; j < u.width; ++j) {
      dz[j] = s[j];
      dzx[j] = ByRow ? q[j] : q[j] - static_cast<double>(st.lag[j]) * s[j];
    }
  }

  // What the columns at j share over all rows.
  struct Operands {
    V mean, rstd, lag, scale, shift;
    template <class P>
    NORMKIT_INLINE Operands(Expanded& st, int64_t j, P part)
        : mean(Affine::load(&st.mean[j], part)), rstd(Affine::load(&st.rstd[j], part)) {
      if constexpr (ByRow) {
        lag = Affine::load(&st.lag[j], part);
        return;
      }
      scale = Affine::load(&st.scale[j], part);
      shift = Affine::load(&st.shift[j], part);
    }
  };

  // dz, and x̂, which lacks the lag where the affine is a column's.
  template <class P>
  NORMKIT_INLINE V point(const Pointers<S>& p, Act act, const Operands& o, int64_t row, int64_t at,
                         P part, V& x) const {
    V d = Base::load_x(p, at, part) - o.mean;
    x = ByRow ? fma(d, o.rstd, -o.lag) : d * o.rstd;
    V z = x;
    if constexpr (K != kBare)
      z = ByRow ? fma(x, V(weight(row)), V(bias(row))) : fma(d, o.scale, o.shift);
    return Base::start(p, act, at, part, z);
  }

  // The means of g and g * x̂ over each pool, times rstd, a value a column.
  struct Means {
    Array<T> flat, steep;
    Means(const ColumnKernel& k, const Unit& u, Expanded& st, const double* dz, const double* dzx,
          const double* n)
        : flat(u.width), steep(u.width) {
      const Columns& g = k.g;
      for (int64_t p = 0; p < k.pools_of(u); ++p) {
        double total_g = 0, total_gx = 0, count = 0;
        for (int64_t j = p * g.group; j < (p + 1) * g.group; ++j) {
          double w = ByRow ? 1 : k.weight((u.begin + j) / g.repeat);
          total_g += w * dz[j];
          total_gx += w * dzx[j];
          count += n[j];
        }
        double mean_g = 0, mean_gx = 0;
        if (k.c.flat) {
          mean_g = k.c.flat[k.first_pool(u) + p];
          mean_gx = k.c.steep[k.first_pool(u) + p];
        } else if (!k.c.given && count > 0) {
          mean_g = k.c.center ? total_g / count : 0;
          mean_gx = total_gx / count;
        }
        for (int64_t j = p * g.group; j < (p + 1) * g.group; ++j) {
          const double steeply = mean_gx * st.rstd[j];
          flat[j] = static_cast<T>(mean_g * st.rstd[j] - (ByRow ? 0 : st.lag[j] * steeply));
          steep[j] = static_cast<T>(steeply);
        }
      }
    }
  };

  void counts(const Unit& u, double* n) const {
    for (int64_t j = 0; j < u.width; ++j) n[j] = c.mask ? 0 : static_cast<double>(g.rows);
    if (!c.mask) return;
    for (int64_t r = 0; r < g.rows; ++r)
      for (int64_t j = 0; j < u.width; ++j) n[j] += c.mask[offset(u, r) + j] != 0;
  }

  // dx of a block; row_sums gets each row's sums of dz and dz * x̂ where the affine is a row's.
  void gradient(const Unit& u, Expanded& st, Means& means, int64_t block, double* row_sums) const {
    const Pointers<S> p = pointers;
    const Act act = c.act;
    const int64_t columns = g.columns;
    rows_of(block, [&](auto many, int64_t r) {
      const int64_t at = offset(u, r);
      Sum<T> dbias[many.count], dweight[many.count];
      Fetch x_ahead(*this, u, p.x, r), dy_ahead(*this, u, p.dy, r);
      across<T>(u.width, [&](int64_t j, auto part) NORMKIT_LAMBDA {
        x_ahead.advance(many), dy_ahead.advance(many);
        const Operands o(st, j, part);
        const V flat = Affine::load(&means.flat[j], part), steep = Affine::load(&means.steep[j], part);
        NORMKIT_UNROLL
        for (int i = 0; i < many.count; ++i) {
          const int64_t down = at + i * columns + j;
          V x, dz = point(p, act, o, r + i, down, part, x);
          V g_rstd = ByRow ? fma(dz * V(weight(r + i)), o.rstd, -flat) : fma(dz, o.scale, -flat);
          if constexpr (ByRow) {
            int slot = static_cast<int>(j / V::kLanes % kParts);
            dbias[i].add(slot, dz);
            dweight[i].add(slot, dz, x);
          }
          Base::write(p, down, part, fma(x, -steep, g_rstd), dz);
        }
      });
      if (ByRow && row_sums)
        NORMKIT_UNROLL
        for (int i = 0; i < many.count; ++i) {
          row_sums[2 * (r + i)] = dbias[i].total();
          row_sums[2 * (r + i) + 1] = dweight[i].total();
        }
    });
  }

  void backward() const {
    int64_t units = g.outer * tiles, unit_size = max(1, g.rows * tile);
    bool wants = c.dweight != nullptr, summing = wants || !c.given;
    bool by_row = wants && ByRow, by_column = wants && !ByRow;
    Array<double> row_sums(by_row ? 2 * units * g.rows : 0);
    Array<double> dz(g.outer * g.columns), dzx(g.outer * g.columns);
    dz.fill(g.outer * g.columns, 0);
    dzx.fill(g.outer * g.columns, 0);
    auto rows_sums_of = [&](int64_t i) { return by_row ? &row_sums[2 * i * g.rows] : nullptr; };
    if (fused()) {
      parallel_for(units, max(1, kGrain / unit_size), [&](int64_t begin, int64_t end) {
        Array<double> s(tile), q(tile), n(tile);
        for (int64_t i = begin; i < end; ++i) {
          Unit u = unit(i);
          Expanded st(*this, u);
          double* mine = &dz[u.outer * g.columns + u.begin];
          double* minex = &dzx[u.outer * g.columns + u.begin];
          if (summing)
            for (int64_t b = 0; b < blocks; ++b) {
              sums(u, st, b, s.get(), q.get());
              for (int64_t j = 0; j < u.width; ++j) {
                mine[j] += s[j];
                minex[j] += q[j];
              }
            }
          if (!c.dx) continue;
          counts(u, n.get());
          Means means(*this, u, st, mine, minex, n.get());
          for (int64_t b = 0; b < blocks; ++b)
            gradient(u, st, means, b, rows_sums_of(i));
        }
      });
    } else {
      int64_t grain = max(1, kGrain / max(1, min(g.rows, block_rows) * tile));
      for (int64_t i = 0; i < units; ++i) {
        Unit u = unit(i);
        int64_t w = u.width;
        Expanded st(*this, u);
        double* mine = &dz[u.outer * g.columns + u.begin];
        double* minex = &dzx[u.outer * g.columns + u.begin];
        if (summing) {
          Array<double> parts(2 * blocks * w);
          parallel_for(blocks, grain, [&](int64_t begin, int64_t end) {
            for (int64_t b = begin; b < end; ++b)
              sums(u, st, b, &parts[2 * b * w], &parts[(2 * b + 1) * w]);
          });
          parallel_for(w, max(16, kGrain / blocks), [&](int64_t begin, int64_t end) {
            for (int64_t b = 0; b < blocks; ++b)
              for (int64_t j = begin; j < end; ++j) {
                mine[j] += parts[2 * b * w + j];
                minex[j] += parts[(2 * b + 1) * w + j];
              }
          });
        }
        if (!c.dx) continue;
        Array<double> n(w);
        counts(u, n.get());
        Means means(*this, u, st, mine, minex, n.get());
        parallel_for(blocks, grain, [&](int64_t begin, int64_t end) {
          for (int64_t b = end - 1; b >= begin; --b)
            gradient(u, st, means, b, rows_sums_of(i));
        });
      }
    }
    if (by_row)
      parallel_for(g.rows, max(1, kGrain / units), [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
          c.dbias[r] = c.dweight[r] = 0;
          for (int64_t i = 0; i < units; ++i) {
            c.dbias[r] += row_sums[2 * (i * g.rows + r)];
            c.dweight[r] += row_sums[2 * (i * g.rows + r) + 1];
          }
        }
      });
    if (by_column)
      parallel_for(g.columns / g.repeat, max(1, kGrain / (g.outer * g.repeat)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t e = begin; e < end; ++e) c.dbias[e] = c.dweight[e] = 0;
                     for (int64_t o = 0; o < g.outer; ++o)
                       for (int64_t e = begin; e < end; ++e)
                         for (int64_t k = 0; k < g.repeat; ++k) {
                           int64_t j = o * g.columns + e * g.repeat + k;
                           c.dbias[e] += dz[j];
                           c.dweight[e] += dzx[j];
                         }
                   });
  }
};

// Calls f with the kind of the call as a constant; of float64, which is bound by memory, fewer.
template <class S, class F>
void by_kind(const Call& c, F f) {
  if (c.mask)
    f(std::integral_constant<Kind, kMasked>());
  else if (c.act != Act::none || sizeof(S) == 8)
    f(std::integral_constant<Kind, kActive>());
  else if constexpr (sizeof(S) < 8)
    f(std::integral_constant<Kind, kBare>());
}

// Calls f with the kernel of the call.
template <class S, class F>
void with_kernel(const Rows& g, const Call& c, F f) {
  by_kind<S>(c, [&](auto kind) { f(RowKernel<S, kind>(g, c)); });
}
template <class S, class F>
void with_kernel(const Columns& g, const Call& c, F f) {
  by_kind<S>(c, [&](auto kind) {
    if (g.affine_per_row)
      f(ColumnKernel<S, kind, true>(g, c));
    else
      f(ColumnKernel<S, kind, false>(g, c));
  });
}

template <class S, class Geometry>
void forward(const Geometry& g, const Call& c) {
  with_kernel<S>(g, c, [](const auto& kernel) { kernel.forward(); });
}
template <class S, class Geometry>
void backward(const Geometry& g, const Call& c) {
  with_kernel<S>(g, c, [](const auto& kernel) { kernel.backward(); });
}

template <class S>
constexpr Kernels all() {
  return {forward<S, Rows>, backward<S, Rows>, forward<S, Columns>, backward<S, Columns>};
}

#ifdef NORMKIT_BFLOAT16
const Kernels kernels = all<BFloat16>();
#else
const Kernels kernels[4] = {all<float>(), all<BFloat16>(), all<Half>(), all<double>()};
#endif

}  // namespace normkit::NORMKIT_ISA
