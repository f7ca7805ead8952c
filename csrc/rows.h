// The kernel of pools that lie along memory.
#pragma once

#include "core.h"
#include "cuts.h"

namespace normkit::NORMKIT_ISA {

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
    const bool center = c.formula.center;
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
      if (c.formula.center && !Base::near(n[i], left[i], squares[i])) {
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
    if (c.formula.center) {
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
    for (int pass = c.formula.center ? 0 : 1; pass < 2; ++pass) {
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
    const Act act = c.formula.act;
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
    const Act act = c.formula.act;
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
    if (c.formula.given && !g.vector_affine && g.segment_step == 0) {
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
          if (!c.formula.given && pools > 1) {
            moments(first, pools, Block(statistic, 0), pools * g.pool_stride, n, mean, m2);
            Base::finish_moments(c, first, pools, n, mean, m2);
          } else if (!c.formula.given) {
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
    if (!c.formula.given) {
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
    const Act act = c.formula.act;
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
    const Act act = c.formula.act;
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
    const Act act = c.formula.act;
    const double gx = mean.dzx * st.rstd[0];
    int64_t at = offset(pool, segment) + begin, e = entry(pool, segment);
    const V center(st.mean[0]), rstd(st.rstd[0]), mean_gx(static_cast<T>(gx));
    const V mean_g(static_cast<T>(mean.dz * st.rstd[0] - st.lag[0] * gx));
    for (int64_t s = 0; s < segments; ++s, at += g.segment_stride, e += g.segment_step) {
      const V scale(st.rstd[0] * weights[e]), shift(biases[e] - st.lag[0] * weights[e]);
      across<T>(size, [&](int64_t j, auto part) NORMKIT_LAMBDA {
        V d = Base::load_x(p, at + j, part) - center;
        V dz = Base::start(p, act, at + j, part, fma(d, scale, shift));
        Base::write(p, at + j, part, fma(d * rstd, -mean_gx, fma(dz, scale, -mean_g)), dz);
      });
    }
  }

  Sums mean_of(int64_t pool, Sums total) const {
    if (c.formula.given) return c.mean_g ? Sums(c.mean_g[pool], c.mean_gx[pool]) : Sums();
    double n = count(pool);
    if (n == 0) return Sums();
    return Sums(c.formula.center ? total.dz / n : 0, total.dzx / n);
  }

  void backward() const {
    if (g.vector_affine) {
      backward_vector();
      return;
    }
    // Segments with one affine share their blocks; those with their own are summed each by itself.
    const int64_t kinds = g.segment_step ? g.segments : 1, each = affine.count;
    const bool wants = c.dweight != nullptr, summing = wants || !c.formula.given;
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

  // dx of some pools that share a vector affine, from <g> and <g x̂> times rstd; dw and db, where
  // given, are added to.
  template <class N>
  void gradient_of_rows(N, int64_t pool, const Standard& st, int64_t of, const T* means_g,
                        const T* means_gx, T* dw, T* db) const {
    constexpr int many = N::count;
    const Pointers<S> p = pointers;
    const Act act = c.formula.act;
    V mean[many], rstd[many], lag[many], mean_g[many], mean_gx[many];
    NORMKIT_UNROLL
    for (int i = 0; i < many; ++i) {
      mean[i] = V(st.mean[of + i]), rstd[i] = V(st.rstd[of + i]), lag[i] = V(st.lag[of + i]);
      mean_g[i] = V(means_g[of + i]), mean_gx[i] = V(means_gx[of + i]);
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
        Base::write(p, k, part, fma(x, -mean_gx[i], fma(dz * wj, rstd[i], -mean_g[i])), dz);
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
          T means_g[kSeveral], means_gx[kSeveral];
          Sums totals[kSeveral];
          for (int64_t i = 0; i < pools; ++i)
            for (int64_t k = 0; k < affine.count && !c.formula.given; ++k)
              totals[i] += sums_of_row(first + i, st, i, Block(affine, k));
          for (int64_t i = 0; i < pools; ++i) {
            const double share = Base::inverse(count(first + i), whole) * st.rstd[i];
            means_g[i] = c.formula.center ? static_cast<T>(totals[i].dz * share) : T(0);
            means_gx[i] = static_cast<T>(totals[i].dzx * share);
          }
          int64_t i = 0;
          auto gradients = [&](auto many) {
            T* mine = wants ? dw + entry(first + i, 0) : nullptr;
            gradient_of_rows(many, first + i, st, i, means_g, means_gx, mine,
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

}  // namespace normkit::NORMKIT_ISA
