// The kernels of one instruction set. Whatever is summed is summed in an order that depends on the
// shape alone, so results are bitwise the same on any number of threads and on every instruction
// set: work is cut into blocks, a block's sums are merged in double in the order of the blocks, and
// the schedule (which thread, fused or in two phases) changes no bit.
//
// Nothing of the standard library is instantiated here: a template compiled for AVX-512 must not be
// the one that the linker keeps for every machine.
#pragma once

#include <cstdlib>
#include <new>

#include "vec.h"

namespace normkit::NORMKIT_ISA {

constexpr int64_t kBlock = 2048;          // elements whose sums are kept in T
constexpr int64_t kGrain = 16384;         // elements below which a thread isn't worth starting
constexpr int64_t kTile = 512;            // columns of a tile
constexpr int64_t kTileElements = 16384;  // elements of a block of a tile

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class F>
void parallel_for(int64_t n, int64_t grain, const F& f) {
  if (n <= grain || n <= 1) {
    if (n > 0) f(0, n);
    return;
  }
  parallel(
      n, grain,
      [](int64_t begin, int64_t end, void* context) {
        (*static_cast<const F*>(context))(begin, end);
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

  NORMKIT_INLINE void merge(double nb, double mean_b, double m2_b) {
    if (nb == 0) return;
    double total = n + nb, delta = mean_b - mean, share = nb / total;
    m2 += m2_b + delta * delta * n * share;
    mean = n == 0 ? mean_b : mean + delta * share;
    n = total;
  }
};

template <int I>
struct Slot {
  static constexpr int index = I;
};

// Calls f(slot, j, part) for the vectors of [0, n); the four slots are for four accumulators.
template <class T, class F>
NORMKIT_INLINE void along(int64_t n, F f) {
  constexpr int64_t lanes = Vec<T>::kLanes;
  int64_t j = 0;
  for (; j + 4 * lanes <= n; j += 4 * lanes) {
    f(Slot<0>(), j, Whole());
    f(Slot<1>(), j + lanes, Whole());
    f(Slot<2>(), j + 2 * lanes, Whole());
    f(Slot<3>(), j + 3 * lanes, Whole());
  }
  for (; j + lanes <= n; j += lanes) f(Slot<0>(), j, Whole());
  if (j < n) f(Slot<1>(), j, Part{static_cast<int>(n - j)});
}

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
  if (act == Act::relu) return where_not_positive(z, Vec<T>(T(0)), g);
  if (act == Act::leaky_relu) return where_not_positive(z, g * Vec<T>(T(kLeakySlope)), g);
  return slope_smoothly(act, z, g);
}

// What flows through at one place of memory: pointers to it, null where there is none.
template <class S>
struct Place {
  const S *x, *residual, *dy, *dtotal, *output;
  S *y, *dx, *dz;
  const uint8_t* mask;

  Place(const Call& c, int64_t at)
      : x(from<S>(c.x, at)),
        residual(from<S>(c.residual, at)),
        dy(from<S>(c.dy, at)),
        dtotal(from<S>(c.dtotal, at)),
        output(from<S>(c.output, at)),
        y(const_cast<S*>(from<S>(c.y, at))),
        dx(const_cast<S*>(from<S>(c.dx, at))),
        dz(const_cast<S*>(from<S>(c.dz, at))),
        mask(c.mask ? c.mask + at : nullptr) {}

  template <class U>
  static const U* from(const void* p, int64_t at) {
    return p ? static_cast<const U*>(p) + at : nullptr;
  }
};

template <class S>
struct Compute {
  using T = float;
};
template <>
struct Compute<double> {
  using T = double;
};

template <class S>
struct Core {
  using T = typename Compute<S>::T;
  using V = Vec<T>;
  using M = Memory<S>;
  using Affine = Memory<T>;

  template <class P>
  static NORMKIT_INLINE V load_x(const Place<S>& at, int64_t j, P part) {
    V x = M::load(at.x + j, part);
    return at.mask ? select(at.mask + j, x, part) : x;
  }

  // y from z = the affine's result.
  template <bool Active, class P>
  static NORMKIT_INLINE void finish(const Call& c, const Place<S>& at, int64_t j, P part, V z) {
    if (at.residual) z = z + M::load(at.residual + j, part);
    if constexpr (Active) z = activate(c.act, z);
    if (at.mask) z = select(at.mask + j, z, part);
    M::store(at.y + j, z, part);
  }

  // dz = dy * act'(z); z is the affine's result.
  template <bool Active, class P>
  static NORMKIT_INLINE V start(const Call& c, const Place<S>& at, int64_t j, P part, V z) {
    V g = M::load(at.dy + j, part);
    if constexpr (Active) {
      if (at.output)
        z = M::load(at.output + j, part);
      else if (at.residual)
        z = z + M::load(at.residual + j, part);
      g = slope(c.act, z, g);
    }
    return at.mask ? select(at.mask + j, g, part) : g;
  }

  template <class P>
  static NORMKIT_INLINE void write(const Place<S>& at, int64_t j, P part, V dx, V dz) {
    if (at.mask) dx = select(at.mask + j, dx, part);
    if (at.dtotal) dx = dx + M::load(at.dtotal + j, part);
    M::store(at.dx + j, dx, part);
    if (at.dz) M::store(at.dz + j, dz, part);
  }

  // x = base + add, for n elements.
  static void add(const Call& c, int64_t at, int64_t n) {
    const S* base = static_cast<const S*>(c.base) + at;
    const S* more = static_cast<const S*>(c.add) + at;
    S* x = const_cast<S*>(static_cast<const S*>(c.x)) + at;
    along<T>(n, [&](auto, int64_t j, auto part) NORMKIT_LAMBDA {
      M::store(x + j, M::load(base + j, part) + M::load(more + j, part), part);
    });
  }

  static double widened(const S* p) {
    S one[16] = {};
    one[0] = *p;
    V v = M::load(one, Whole());
    T lanes[V::kLanes];
    std::memcpy(lanes, &v, 64);
    return lanes[0];
  }

  // A sum of squares in T that overflowed, or may have vanished where eps doesn't hide that.
  static bool unsafe(const Call& c, double n, T squares) {
    if (sizeof(T) == 8) return false;
    return !(squares <= 3e38f) || (c.eps < 1e-20 && squares < n * 1e-30);
  }

  static void finish_moments(const Call& c, const Moments& m, int64_t pool) {
    double var = m.n > 0 ? m.m2 / m.n : 0;
    c.mean[pool] = m.mean;
    static_cast<T*>(c.var)[pool] = static_cast<T>(var);
    static_cast<T*>(c.rstd)[pool] = static_cast<T>(1 / std::sqrt(var + c.eps));
  }

  static void take_given(const Call& c, int64_t pool) {
    double var = static_cast<T*>(c.var)[pool];
    static_cast<T*>(c.rstd)[pool] = static_cast<T>(1 / std::sqrt(var + c.eps));
  }
};

// ---- Rows ---------------------------------------------------------------------------------------

template <class S>
struct RowKernel : Core<S> {
  using typename Core<S>::T;
  using typename Core<S>::V;
  using typename Core<S>::M;
  using typename Core<S>::Affine;
  using Core<S>::load_x;

  // The runs of one pool cut into blocks: pieces of a long run, or several short runs.
  struct Blocks {
    int64_t segments, length, base, pieces, together, count;

    Blocks(int64_t segments, int64_t length, int64_t base = 0)
        : segments(segments), length(length), base(base) {
      pieces = max(1, ceil_div(length, kBlock));
      together = pieces > 1 ? 1 : max(1, kBlock / max(1, length));
      count = pieces > 1 ? segments * pieces : ceil_div(segments, together);
    }
    int64_t first(int64_t block) const {
      return base + (pieces > 1 ? block / pieces : block * together);
    }
    int64_t runs(int64_t block) const {
      return pieces > 1 ? 1 : min(together, segments - block * together);
    }
    int64_t begin(int64_t block) const { return pieces > 1 ? block % pieces * kBlock : 0; }
    int64_t size(int64_t block) const {
      return pieces > 1 ? min(kBlock, length - begin(block)) : length;
    }
  };

  struct Standard {
    T mean, rest, rstd;
    Standard(const Call& c, int64_t pool) {
      mean = static_cast<T>(c.mean[pool]);
      rest = c.center ? static_cast<T>(c.mean[pool] - mean) : T(0);
      rstd = static_cast<T*>(c.rstd)[pool];
    }
    NORMKIT_INLINE V centered(V x) const { return (x - V(mean)) - V(rest); }
  };

  const Rows& g;
  const Call& c;
  RowKernel(const Rows& g, const Call& c) : g(g), c(c) {}

  int64_t offset(int64_t pool, int64_t segment) const {
    return pool * g.pool_stride + segment * g.segment_stride;
  }
  int64_t entry(int64_t pool, int64_t segment) const {
    return pool % g.period * g.pool_step + segment * g.segment_step;
  }
  const T* weight(int64_t entry) const { return static_cast<const T*>(c.weight) + entry; }
  const T* bias(int64_t entry) const { return static_cast<const T*>(c.bias) + entry; }
  // Runs that follow each other in memory are one run to the statistics.
  Blocks statistic_blocks() const {
    bool joined = g.segment_stride == g.length;
    return joined ? Blocks(1, g.segments * g.length) : Blocks(g.segments, g.length);
  }

  // Each run of a block, from its place on.
  template <class F>
  NORMKIT_INLINE void runs(const Blocks& blocks, int64_t pool, int64_t block, F f) const {
    int64_t first = blocks.first(block), n = blocks.runs(block), begin = blocks.begin(block);
    for (int64_t s = first; s < first + n; ++s)
      f(Place<S>(c, offset(pool, s) + begin), s, begin, blocks.size(block));
  }

  double count(const Blocks& blocks, int64_t pool, int64_t block) const {
    if (!c.mask) return static_cast<double>(blocks.runs(block) * blocks.size(block));
    int64_t n = 0;
    runs(blocks, pool, block, [&](const Place<S>& at, int64_t, int64_t, int64_t size) {
      for (int64_t j = 0; j < size; ++j) n += at.mask[j] != 0;
    });
    return static_cast<double>(n);
  }
  double count(const Blocks& blocks, int64_t pool) const {
    if (!c.mask) return static_cast<double>(g.segments * g.length);
    double n = 0;
    for (int64_t b = 0; b < blocks.count; ++b) n += count(blocks, pool, b);
    return n;
  }

  Moments moments(const Blocks& blocks, int64_t pool, int64_t block) const {
    Moments m;
    m.n = count(blocks, pool, block);
    if (m.n == 0) return m;
    T mean = 0;
    if (c.center) {
      V s[4] = {V(T(0)), V(T(0)), V(T(0)), V(T(0))};
      runs(blocks, pool, block, [&](const Place<S>& at, int64_t, int64_t, int64_t size) {
        along<T>(size, [&](auto slot, int64_t j, auto part) NORMKIT_LAMBDA {
          s[slot.index] = s[slot.index] + load_x(at, j, part);
        });
      });
      mean = sum((s[0] + s[1]) + (s[2] + s[3])) / static_cast<T>(m.n);
    }
    V s[4] = {V(T(0)), V(T(0)), V(T(0)), V(T(0))}, q[4] = {V(T(0)), V(T(0)), V(T(0)), V(T(0))};
    runs(blocks, pool, block, [&](const Place<S>& at, int64_t, int64_t, int64_t size) {
      along<T>(size, [&](auto slot, int64_t j, auto part) NORMKIT_LAMBDA {
        V d = keep(M::load(at.x + j, part) - V(mean), part);
        if (at.mask) d = select(at.mask + j, d, part);
        s[slot.index] = s[slot.index] + d;
        q[slot.index] = q[slot.index] + d * d;
      });
    });
    T left = sum((s[0] + s[1]) + (s[2] + s[3])), squares = sum((q[0] + q[1]) + (q[2] + q[3]));
    if (this->unsafe(c, m.n, squares)) return moments_in_double(blocks, pool, block, m.n);
    if (c.center) {
      m.mean = mean + left / m.n;
      m.m2 = squares - static_cast<double>(left) * left / m.n;
    } else {
      m.m2 = squares;
    }
    return m;
  }

  __attribute__((noinline)) Moments moments_in_double(const Blocks& blocks, int64_t pool,
                                                      int64_t block, double n) const {
    Moments m;
    m.n = n;
    for (int pass = c.center ? 0 : 1; pass < 2; ++pass) {
      double total = 0;
      runs(blocks, pool, block, [&](const Place<S>& at, int64_t, int64_t, int64_t size) {
        for (int64_t j = 0; j < size; ++j) {
          if (at.mask && !at.mask[j]) continue;
          double d = this->widened(at.x + j) - m.mean;
          total += pass ? d * d : d;
        }
      });
      (pass ? m.m2 : m.mean) = pass ? total : total / n;
    }
    return m;
  }

  template <bool Active>
  void apply(int64_t pool, int64_t segment, int64_t begin, int64_t size) const {
    Standard s(c, pool);
    Place<S> at(c, offset(pool, segment) + begin);
    int64_t e = entry(pool, segment);
    if (g.vector_affine) {
      const T *w = weight(e) + begin, *b = bias(e) + begin;
      along<T>(size, [&](auto, int64_t j, auto part) NORMKIT_LAMBDA {
        V standard = s.centered(M::load(at.x + j, part)) * V(s.rstd);
        V z = standard * Affine::load(w + j, part) + Affine::load(b + j, part);
        this->template finish<Active>(c, at, j, part, z);
      });
    } else {
      V scale(s.rstd * *weight(e)), shift(*bias(e));
      along<T>(size, [&](auto, int64_t j, auto part) NORMKIT_LAMBDA {
        V z = s.centered(M::load(at.x + j, part)) * scale + shift;
        this->template finish<Active>(c, at, j, part, z);
      });
    }
  }

  template <bool Active>
  void forward() const {
    Blocks blocks = statistic_blocks();
    int64_t pool_size = g.segments * g.length;
    if (g.pools >= 4 * threads() || g.pools * pool_size <= kGrain) {
      parallel_for(g.pools, max(1, kGrain / max(1, pool_size)), [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p) {
          if (c.add)
            for (int64_t s = 0; s < g.segments; ++s) this->add(c, offset(p, s), g.length);
          if (c.given) {
            this->take_given(c, p);
          } else {
            Moments m;
            for (int64_t b = 0; b < blocks.count; ++b) {
              Moments one = moments(blocks, p, b);
              m.merge(one.n, one.mean, one.m2);
            }
            this->finish_moments(c, m, p);
          }
          for (int64_t s = 0; s < g.segments; ++s) apply<Active>(p, s, 0, g.length);
        }
      });
      return;
    }
    int64_t grain = max(1, kGrain / kBlock);
    if (c.add)
      pieces([&](int64_t p, int64_t s, int64_t begin, int64_t size) {
        this->add(c, offset(p, s) + begin, size);
      });
    if (c.given) {
      for (int64_t p = 0; p < g.pools; ++p) this->take_given(c, p);
    } else {
      Array<Moments> parts(g.pools * blocks.count);
      parallel_for(g.pools * blocks.count, grain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
          parts[i] = moments(blocks, i / blocks.count, i % blocks.count);
      });
      for (int64_t p = 0; p < g.pools; ++p) {
        Moments m;
        for (int64_t b = 0; b < blocks.count; ++b) {
          const Moments& one = parts[p * blocks.count + b];
          m.merge(one.n, one.mean, one.m2);
        }
        this->finish_moments(c, m, p);
      }
    }
    pieces([&](int64_t p, int64_t s, int64_t begin, int64_t size) {
      apply<Active>(p, s, begin, size);
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

  // Over a block: the sums of g and g * x̂, g = dz where the affine is a scalar, else dz * weight.
  template <bool Active>
  Sums sums(const Blocks& blocks, int64_t pool, int64_t block) const {
    Standard st(c, pool);
    V s[4] = {V(T(0)), V(T(0)), V(T(0)), V(T(0))}, q[4] = {V(T(0)), V(T(0)), V(T(0)), V(T(0))};
    runs(blocks, pool, block,
         [&](const Place<S>& at, int64_t segment, int64_t from, int64_t size) {
           int64_t e = entry(pool, segment);
           const T *w = weight(e), *b = bias(e);
           if (g.vector_affine) {
             w += from;
             b += from;
             along<T>(size, [&](auto slot, int64_t j, auto part) NORMKIT_LAMBDA {
               V x = st.centered(load_x(at, j, part)) * V(st.rstd), wj = Affine::load(w + j, part);
               V z = Active ? x * wj + Affine::load(b + j, part) : x;
               V dz = this->template start<Active>(c, at, j, part, z) * wj;
               s[slot.index] = s[slot.index] + dz;
               q[slot.index] = q[slot.index] + dz * x;
             });
           } else {
             V scale(st.rstd * *w), shift(*b);
             along<T>(size, [&](auto slot, int64_t j, auto part) NORMKIT_LAMBDA {
               V d = st.centered(load_x(at, j, part));
               V dz = this->template start<Active>(c, at, j, part, d * scale + shift);
               s[slot.index] = s[slot.index] + dz;
               q[slot.index] = q[slot.index] + dz * (d * V(st.rstd));
             });
           }
         });
    Sums total;
    total.dz = sum((s[0] + s[1]) + (s[2] + s[3]));
    total.dzx = sum((q[0] + q[1]) + (q[2] + q[3]));
    return total;
  }

  // dx = (dz * weight - <g> - x̂ <g x̂>) * rstd; dw and db, where given, are added to.
  template <bool Active>
  void gradient(int64_t pool, int64_t segment, int64_t begin, int64_t size, Sums mean_g, T* dw,
                T* db) const {
    Standard st(c, pool);
    Place<S> at(c, offset(pool, segment) + begin);
    int64_t e = entry(pool, segment);
    const T *w = weight(e) + (g.vector_affine ? begin : 0);
    const T *b = bias(e) + (g.vector_affine ? begin : 0);
    V rstd(st.rstd);
    V flat(static_cast<T>(mean_g.dz * st.rstd)), steep(static_cast<T>(mean_g.dzx * st.rstd));
    if (g.vector_affine) {
      along<T>(size, [&](auto, int64_t j, auto part) NORMKIT_LAMBDA {
        V x = st.centered(load_x(at, j, part)) * rstd, wj = Affine::load(w + j, part);
        V z = Active ? x * wj + Affine::load(b + j, part) : x;
        V dz = this->template start<Active>(c, at, j, part, z);
        if (dw) {
          Affine::store(dw + j, Affine::load(dw + j, part) + dz * x, part);
          Affine::store(db + j, Affine::load(db + j, part) + dz, part);
        }
        this->write(at, j, part, (dz * wj * rstd - flat) - x * steep, dz);
      });
    } else {
      V scale(st.rstd * *w), shift(*b);
      along<T>(size, [&](auto, int64_t j, auto part) NORMKIT_LAMBDA {
        V d = st.centered(load_x(at, j, part));
        V dz = this->template start<Active>(c, at, j, part, d * scale + shift);
        this->write(at, j, part, (dz * scale - flat) - (d * rstd) * steep, dz);
      });
    }
  }

  Sums mean_of(Sums g_sums, double n) const {
    Sums mean;
    if (c.given || n == 0) return mean;
    mean.dz = c.center ? g_sums.dz / n : 0;
    mean.dzx = g_sums.dzx / n;
    return mean;
  }

  template <bool Active>
  void backward() const {
    Blocks counting = statistic_blocks();
    if (g.vector_affine) {
      backward_vector<Active>(counting);
      return;
    }
    // Segments with one affine share their blocks; those with their own are summed each by itself.
    int64_t kinds = g.segment_step ? g.segments : 1, shared = g.segment_step ? 1 : g.segments;
    int64_t per_kind = Blocks(shared, g.length).count, pool_size = g.segments * g.length;
    bool wants = c.dweight != nullptr, summing = wants || !c.given;
    auto block_sums = [&](int64_t p, int64_t kind, int64_t b) {
      return sums<Active>(Blocks(shared, g.length, kind), p, b);
    };
    auto mean = [&](int64_t p, const Sums* of_kinds) {
      Sums total;
      for (int64_t k = 0; k < kinds; ++k) {
        double w = *weight(entry(p, k));
        total += Sums{w * of_kinds[k].dz, w * of_kinds[k].dzx};
      }
      return mean_of(total, count(counting, p));
    };
    Array<Sums> parts(g.pools * kinds);
    parts.fill(g.pools * kinds, Sums());
    if (g.pools >= 4 * threads() || g.pools * pool_size <= kGrain) {
      parallel_for(g.pools, max(1, kGrain / max(1, pool_size)), [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p) {
          Sums* mine = &parts[p * kinds];
          if (summing)
            for (int64_t k = 0; k < kinds; ++k)
              for (int64_t b = 0; b < per_kind; ++b) mine[k] += block_sums(p, k, b);
          Sums m = mean(p, mine);
          for (int64_t s = 0; s < g.segments; ++s)
            gradient<Active>(p, s, 0, g.length, m, nullptr, nullptr);
        }
      });
    } else {
      int64_t per_pool = kinds * per_kind;
      Array<Sums> small(g.pools * per_pool), means(g.pools);
      if (summing)
        parallel_for(g.pools * per_pool, max(1, kGrain / kBlock), [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i)
            small[i] = block_sums(i / per_pool, i % per_pool / per_kind, i % per_kind);
        });
      for (int64_t p = 0; p < g.pools; ++p) {
        if (summing)
          for (int64_t i = 0; i < per_pool; ++i)
            parts[p * kinds + i / per_kind] += small[p * per_pool + i];
        means[p] = mean(p, &parts[p * kinds]);
      }
      pieces([&](int64_t p, int64_t s, int64_t begin, int64_t size) {
        gradient<Active>(p, s, begin, size, means[p], nullptr, nullptr);
      });
    }
    if (!wants) return;
    int64_t repeats = g.pools / g.period * kinds;
    parallel_for(g.period, max(1, kGrain / max(1, repeats)), [&](int64_t begin, int64_t end) {
      for (int64_t q = begin; q < end; ++q)
        for (int64_t k = 0; k < kinds; ++k) {
          Sums total;
          for (int64_t p = q; p < g.pools; p += g.period) total += parts[p * kinds + k];
          c.dweight[entry(q, k)] = total.dzx;
          c.dbias[entry(q, k)] = total.dz;
        }
    });
  }

  template <bool Active>
  void backward_vector(const Blocks& blocks) const {
    int64_t entries = g.period * g.length;
    int64_t rows = max(ceil_div(32, g.period) * g.period,
                       ceil_div(ceil_div(g.pools, 256), g.period) * g.period);
    int64_t chunks = ceil_div(g.pools, rows);
    bool wants = c.dweight != nullptr;
    Array<T> parts(wants ? 2 * chunks * entries : 0);
    parallel_for(chunks, max(1, kGrain / max(1, rows * g.length)), [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        T* dw = wants ? &parts[2 * chunk * entries] : nullptr;
        if (wants)
          for (int64_t i = 0; i < 2 * entries; ++i) dw[i] = 0;
        for (int64_t p = chunk * rows; p < min(g.pools, (chunk + 1) * rows); ++p) {
          Sums total;
          for (int64_t b = 0; b < blocks.count; ++b) total += sums<Active>(blocks, p, b);
          Sums mean = mean_of(total, count(blocks, p));
          int64_t e = entry(p, 0);
          gradient<Active>(p, 0, 0, g.length, mean, wants ? dw + e : nullptr,
                           wants ? dw + entries + e : nullptr);
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

template <class S>
struct ColumnKernel : Core<S> {
  using typename Core<S>::T;
  using typename Core<S>::V;
  using typename Core<S>::M;
  using typename Core<S>::Affine;

  // A tile's columns of one matrix, cut into blocks of rows.
  struct Unit {
    int64_t outer, begin, width;
  };

  const Columns& g;
  const Call& c;
  int64_t tile, tiles, block_rows, blocks;

  ColumnKernel(const Columns& g, const Call& c) : g(g), c(c) {
    tile = g.group;
    while (tile < kTile) tile *= 2;
    if (g.affine_per_row) tile = max(64, min(1024, 65536 / max(1, g.rows) / 64 * 64));
    tile = max(1, min(tile, g.columns));
    tiles = ceil_div(g.columns, tile);
    block_rows = max(8, min(256, kTileElements / tile / 4 * 4));
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
    for (; r + 4 <= end; r += 4) f(Slot<4>(), r);
    for (; r < end; ++r) f(Slot<1>(), r);
  }

  // What a unit's columns need, expanded from pools and affine entries: a value a column.
  struct Standard {
    Array<T> mean, rest, rstd, scale, shift;
    Standard(const ColumnKernel& k, const Unit& u)
        : mean(u.width), rest(u.width), rstd(u.width), scale(u.width), shift(u.width) {
      const Columns& g = k.g;
      const Call& c = k.c;
      for (int64_t j = 0; j < u.width; ++j) {
        int64_t pool = k.first_pool(u) + j / g.group;
        mean[j] = static_cast<T>(c.mean[pool]);
        rest[j] = c.center ? static_cast<T>(c.mean[pool] - mean[j]) : T(0);
        rstd[j] = static_cast<T*>(c.rstd)[pool];
        if (g.affine_per_row) continue;
        int64_t e = (u.begin + j) / g.repeat;
        scale[j] = rstd[j] * static_cast<const T*>(c.weight)[e];
        shift[j] = static_cast<const T*>(c.bias)[e];
      }
    }
  };

  // Count, mean and M2 a column.
  struct ColumnMoments {
    Array<double> n, mean, m2;
    explicit ColumnMoments(int64_t width) : n(width), mean(width), m2(width) {
      n.fill(width, 0);
      mean.fill(width, 0);
      m2.fill(width, 0);
    }
  };

  void moments(const Unit& u, int64_t block, double* n, double* mean, double* m2) const {
    int64_t w = u.width, first = block * block_rows, last = min(g.rows, first + block_rows);
    if (c.add)
      for (int64_t r = first; r < last; ++r) this->add(c, offset(u, r), w);
    Array<T> s(w), m(w), q(w);
    for (int64_t j = 0; j < w; ++j) n[j] = static_cast<double>(last - first);
    if (c.mask) {
      for (int64_t j = 0; j < w; ++j) n[j] = 0;
      for (int64_t r = first; r < last; ++r) {
        const uint8_t* mask = c.mask + offset(u, r);
        for (int64_t j = 0; j < w; ++j) n[j] += mask[j] != 0;
      }
    }
    m.fill(w, 0);
    s.fill(w, 0);
    q.fill(w, 0);
    if (c.center) {
      rows_of(block, [&](auto many, int64_t r) {
        Place<S> at(c, offset(u, r));
        across<T>(w, [&](int64_t j, auto part) NORMKIT_LAMBDA {
          V x[many.index];
          for (int i = 0; i < many.index; ++i) x[i] = this->load_x(at, i * g.columns + j, part);
          V total = x[0];
          for (int i = 1; i < many.index; ++i) total = total + x[i];
          Affine::store(&m[j], Affine::load(&m[j], part) + total, part);
        });
      });
      for (int64_t j = 0; j < w; ++j) m[j] = n[j] > 0 ? m[j] / static_cast<T>(n[j]) : T(0);
    }
    rows_of(block, [&](auto many, int64_t r) {
      Place<S> at(c, offset(u, r));
      across<T>(w, [&](int64_t j, auto part) NORMKIT_LAMBDA {
        V mean_j = Affine::load(&m[j], part);
        V left(T(0)), squares(T(0));
        for (int i = 0; i < many.index; ++i) {
          V d = M::load(at.x + i * g.columns + j, part) - mean_j;
          if (at.mask) d = select(at.mask + i * g.columns + j, d, part);
          left = left + d;
          squares = squares + d * d;
        }
        Affine::store(&s[j], Affine::load(&s[j], part) + left, part);
        Affine::store(&q[j], Affine::load(&q[j], part) + squares, part);
      });
    });
    bool safe = true;
    for (int64_t j = 0; j < w; ++j) {
      double count = n[j] > 0 ? n[j] : 1, left = c.center ? s[j] : T(0);
      mean[j] = m[j] + left / count;
      m2[j] = q[j] - left * left / count;
      safe &= !this->unsafe(c, n[j], q[j]);
    }
    if (safe) return;
    for (int64_t j = 0; j < w; ++j) {
      if (!this->unsafe(c, n[j], q[j]) || n[j] == 0) continue;
      mean[j] = 0;
      for (int pass = c.center ? 0 : 1; pass < 2; ++pass) {
        double total = 0;
        for (int64_t r = first; r < last; ++r) {
          Place<S> at(c, offset(u, r) + j);
          if (at.mask && !*at.mask) continue;
          double d = this->widened(at.x) - mean[j];
          total += pass ? d * d : d;
        }
        (pass ? m2 : mean)[j] = pass ? total : total / n[j];
      }
    }
  }

  static void merge(ColumnMoments& all, int64_t begin, int64_t end, const double* n,
                    const double* mean, const double* m2) {
    for (int64_t j = begin; j < end; ++j) {
      double total = all.n[j] + n[j], share = n[j] / (total > 0 ? total : 1);
      double delta = mean[j] - all.mean[j];
      all.m2[j] += m2[j] + delta * delta * all.n[j] * share;
      all.mean[j] = all.n[j] > 0 ? all.mean[j] + delta * share : mean[j];
      all.n[j] = total;
    }
  }

  void finish(const Unit& u, ColumnMoments& all) const {
    for (int64_t p = 0; p < pools_of(u); ++p) {
      Moments m;
      for (int64_t j = p * g.group; j < (p + 1) * g.group; ++j)
        m.merge(all.n[j], all.mean[j], all.m2[j]);
      this->finish_moments(c, m, first_pool(u) + p);
    }
  }

  template <bool Active>
  void apply(const Unit& u, Standard& st, int64_t block) const {
    rows_of(block, [&](auto many, int64_t r) {
      Place<S> at(c, offset(u, r));
      across<T>(u.width, [&](int64_t j, auto part) NORMKIT_LAMBDA {
        V mean = Affine::load(&st.mean[j], part), rest = Affine::load(&st.rest[j], part);
        if (g.affine_per_row) {
          V rstd = Affine::load(&st.rstd[j], part);
          for (int i = 0; i < many.index; ++i) {
            int64_t k = i * g.columns + j;
            V standard = ((M::load(at.x + k, part) - mean) - rest) * rstd;
            V z = standard * V(weight(r + i)) + V(bias(r + i));
            Core<S>::template finish<Active>(c, at, k, part, z);
          }
        } else {
          V scale = Affine::load(&st.scale[j], part), shift = Affine::load(&st.shift[j], part);
          for (int i = 0; i < many.index; ++i) {
            int64_t k = i * g.columns + j;
            V z = ((M::load(at.x + k, part) - mean) - rest) * scale + shift;
            Core<S>::template finish<Active>(c, at, k, part, z);
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

  template <bool Active>
  void forward() const {
    int64_t units = g.outer * tiles, unit_size = max(1, g.rows * tile);
    if (c.given)
      for (int64_t p = 0; p < g.outer * g.columns / g.group; ++p) this->take_given(c, p);
    if (fused()) {
      parallel_for(units, max(1, kGrain / unit_size), [&](int64_t begin, int64_t end) {
        Array<double> n(tile), mean(tile), m2(tile);
        for (int64_t i = begin; i < end; ++i) {
          Unit u = unit(i);
          if (!c.given) {
            ColumnMoments all(u.width);
            for (int64_t b = 0; b < blocks; ++b) {
              moments(u, b, n.get(), mean.get(), m2.get());
              merge(all, 0, u.width, n.get(), mean.get(), m2.get());
            }
            finish(u, all);
          }
          Standard st(*this, u);
          for (int64_t b = 0; b < blocks; ++b) apply<Active>(u, st, b);
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
          for (int64_t b = 0; b < blocks; ++b) {
            const double* p = &parts[3 * b * w];
            merge(all, begin, end, p, p + w, p + 2 * w);
          }
        });
        finish(u, all);
      }
      Standard st(*this, u);
      // Last blocks first: they are the likeliest to be still in cache.
      parallel_for(blocks, grain, [&](int64_t begin, int64_t end) {
        for (int64_t b = end - 1; b >= begin; --b) apply<Active>(u, st, b);
      });
    }
  }

  // ---- backward

  // A column's sums of g and g * x̂ over a block; g = dz, weighted where the affine is a row's.
  template <bool Active>
  void sums(const Unit& u, Standard& st, int64_t block, double* dz, double* dzx) const {
    Array<T> s(u.width), q(u.width);
    s.fill(u.width, 0);
    q.fill(u.width, 0);
    rows_of(block, [&](auto many, int64_t r) {
      Place<S> at(c, offset(u, r));
      across<T>(u.width, [&](int64_t j, auto part) NORMKIT_LAMBDA {
        V left(T(0)), right(T(0));
        for (int i = 0; i < many.index; ++i) {
          V x, g = point<Active>(at, st, r + i, i * this->g.columns, j, part, x);
          if (this->g.affine_per_row) g = g * V(weight(r + i));
          left = left + g;
          right = right + g * x;
        }
        Affine::store(&s[j], Affine::load(&s[j], part) + left, part);
        Affine::store(&q[j], Affine::load(&q[j], part) + right, part);
      });
    });
    for (int64_t j = 0; j < u.width; ++j) {
      dz[j] = s[j];
      dzx[j] = q[j];
    }
  }

  // dz, and x̂.
  template <bool Active, class P>
  NORMKIT_INLINE V point(const Place<S>& at, Standard& st, int64_t row, int64_t down, int64_t j,
                         P part, V& x) const {
    V d = (Core<S>::load_x(at, down + j, part) - Affine::load(&st.mean[j], part)) -
          Affine::load(&st.rest[j], part);
    x = d * Affine::load(&st.rstd[j], part);
    V z = x;
    if constexpr (Active)
      z = g.affine_per_row
              ? x * V(weight(row)) + V(bias(row))
              : d * Affine::load(&st.scale[j], part) + Affine::load(&st.shift[j], part);
    return Core<S>::template start<Active>(c, at, down + j, part, z);
  }

  // The means of g and g * x̂ over each pool, times rstd, a value a column.
  struct Means {
    Array<T> flat, steep;
    Means(const ColumnKernel& k, const Unit& u, Standard& st, const double* dz, const double* dzx,
          const double* n)
        : flat(u.width), steep(u.width) {
      const Columns& g = k.g;
      for (int64_t p = 0; p < k.pools_of(u); ++p) {
        double total_g = 0, total_gx = 0, count = 0;
        for (int64_t j = p * g.group; j < (p + 1) * g.group; ++j) {
          double w = g.affine_per_row ? 1 : k.weight((u.begin + j) / g.repeat);
          total_g += w * dz[j];
          total_gx += w * dzx[j];
          count += n[j];
        }
        bool none = k.c.given || count == 0;
        for (int64_t j = p * g.group; j < (p + 1) * g.group; ++j) {
          flat[j] = none || !k.c.center ? T(0) : static_cast<T>(total_g / count * st.rstd[j]);
          steep[j] = none ? T(0) : static_cast<T>(total_gx / count * st.rstd[j]);
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
  template <bool Active>
  void gradient(const Unit& u, Standard& st, Means& means, int64_t block, double* row_sums) const {
    rows_of(block, [&](auto many, int64_t r) {
      Place<S> at(c, offset(u, r));
      V dbias[many.index], dweight[many.index];
      for (int i = 0; i < many.index; ++i) dbias[i] = dweight[i] = V(T(0));
      across<T>(u.width, [&](int64_t j, auto part) NORMKIT_LAMBDA {
        V flat = Affine::load(&means.flat[j], part), steep = Affine::load(&means.steep[j], part);
        for (int i = 0; i < many.index; ++i) {
          int64_t down = i * g.columns;
          V x, dz = point<Active>(at, st, r + i, down, j, part, x);
          V g_rstd = g.affine_per_row ? dz * V(weight(r + i)) * Affine::load(&st.rstd[j], part)
                                      : dz * Affine::load(&st.scale[j], part);
          if (row_sums) {
            dbias[i] = dbias[i] + dz;
            dweight[i] = dweight[i] + dz * x;
          }
          this->write(at, down + j, part, (g_rstd - flat) - x * steep, dz);
        }
      });
      if (row_sums)
        for (int i = 0; i < many.index; ++i) {
          row_sums[2 * (r + i)] = sum(dbias[i]);
          row_sums[2 * (r + i) + 1] = sum(dweight[i]);
        }
    });
  }

  template <bool Active>
  void backward() const {
    int64_t units = g.outer * tiles, unit_size = max(1, g.rows * tile);
    bool wants = c.dweight != nullptr, summing = wants || !c.given;
    bool by_row = wants && g.affine_per_row, by_column = wants && !g.affine_per_row;
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
          Standard st(*this, u);
          double* mine = &dz[u.outer * g.columns + u.begin];
          double* minex = &dzx[u.outer * g.columns + u.begin];
          if (summing)
            for (int64_t b = 0; b < blocks; ++b) {
              sums<Active>(u, st, b, s.get(), q.get());
              for (int64_t j = 0; j < u.width; ++j) {
                mine[j] += s[j];
                minex[j] += q[j];
              }
            }
          counts(u, n.get());
          Means means(*this, u, st, mine, minex, n.get());
          for (int64_t b = 0; b < blocks; ++b)
            gradient<Active>(u, st, means, b, rows_sums_of(i));
        }
      });
    } else {
      int64_t grain = max(1, kGrain / max(1, min(g.rows, block_rows) * tile));
      for (int64_t i = 0; i < units; ++i) {
        Unit u = unit(i);
        int64_t w = u.width;
        Standard st(*this, u);
        double* mine = &dz[u.outer * g.columns + u.begin];
        double* minex = &dzx[u.outer * g.columns + u.begin];
        if (summing) {
          Array<double> parts(2 * blocks * w);
          parallel_for(blocks, grain, [&](int64_t begin, int64_t end) {
            for (int64_t b = begin; b < end; ++b)
              sums<Active>(u, st, b, &parts[2 * b * w], &parts[(2 * b + 1) * w]);
          });
          parallel_for(w, max(16, kGrain / blocks), [&](int64_t begin, int64_t end) {
            for (int64_t b = 0; b < blocks; ++b)
              for (int64_t j = begin; j < end; ++j) {
                mine[j] += parts[2 * b * w + j];
                minex[j] += parts[(2 * b + 1) * w + j];
              }
          });
        }
        Array<double> n(w);
        counts(u, n.get());
        Means means(*this, u, st, mine, minex, n.get());
        parallel_for(blocks, grain, [&](int64_t begin, int64_t end) {
          for (int64_t b = end - 1; b >= begin; --b)
            gradient<Active>(u, st, means, b, rows_sums_of(i));
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

template <class S>
void rows_forward(const Rows& g, const Call& c) {
  RowKernel<S> kernel(g, c);
  c.act == Act::none ? kernel.template forward<false>() : kernel.template forward<true>();
}
template <class S>
void rows_backward(const Rows& g, const Call& c) {
  RowKernel<S> kernel(g, c);
  c.act == Act::none ? kernel.template backward<false>() : kernel.template backward<true>();
}
template <class S>
void columns_forward(const Columns& g, const Call& c) {
  ColumnKernel<S> kernel(g, c);
  c.act == Act::none ? kernel.template forward<false>() : kernel.template forward<true>();
}
template <class S>
void columns_backward(const Columns& g, const Call& c) {
  ColumnKernel<S> kernel(g, c);
  c.act == Act::none ? kernel.template backward<false>() : kernel.template backward<true>();
}

template <class S>
constexpr Kernels all() {
  return {rows_forward<S>, rows_backward<S>, columns_forward<S>, columns_backward<S>};
}

const Kernels kernels[4] = {all<float>(), all<BFloat16>(), all<Half>(), all<double>()};

}  // namespace normkit::NORMKIT_ISA
