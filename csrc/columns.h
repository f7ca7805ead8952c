// The kernel of pools that lie across memory: statistics down the columns of a matrix.
#pragma once

#include "core.h"
#include "cuts.h"

namespace normkit::NORMKIT_ISA {

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
        lag[j] = c.formula.center ? static_cast<T>((c.mean[pool] - mean[j]) * rstd[j]) : T(0);
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

  // Each column's elements in some rows; with a mask, what it leaves of them.
  void counts(const Unit& u, int64_t first, int64_t last, double* n) const {
    for (int64_t j = 0; j < u.width; ++j) n[j] = c.mask ? 0 : static_cast<double>(last - first);
    if (!c.mask) return;
    for (int64_t r = first; r < last; ++r) {
      const uint8_t* mask = c.mask + offset(u, r);
      for (int64_t j = 0; j < u.width; ++j) n[j] += mask[j] != 0;
    }
  }

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
    Array<double> n(w);
    counts(u, first, last, n.get());
    for (int64_t j = 0; j < w; ++j) m[j] = n[j] > 0 ? m[j] / static_cast<T>(n[j]) : T(0);
  }

  void moments(const Unit& u, int64_t block, double* n, double* mean, double* m2) const {
    const Pointers<S> p = pointers;
    int64_t w = u.width, first = block * block_rows, last = min(g.rows, first + block_rows);
    if (c.add)
      for (int64_t r = first; r < last; ++r) Base::add(c, offset(u, r), w);
    Array<T> s(w), m(w), q(w);
    const double whole = 1 / static_cast<double>(last - first);
    counts(u, first, last, n);
    // About provisional means, those of the first rows, or of all rows where some are far off.
    m.fill(w, 0);
    if (c.formula.center) means_of_rows(u, first, min(last, first + kSomeRows), m.get());
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
      if (pass || !c.formula.center) break;
      bool all_near = true;
      for (int64_t j = 0; j < w; ++j) all_near &= Base::near(n[j], s[j], q[j]);
      if (all_near) break;
      for (int64_t j = 0; j < w; ++j)
        if (!Base::near(n[j], s[j], q[j])) m[j] += s[j] * static_cast<T>(Base::inverse(n[j], whole));
    }
    const double least = Base::least(c);
    bool safe = true;
    for (int64_t j = 0; j < w; ++j) {
      double left = c.formula.center ? s[j] : T(0), rest = left * Base::inverse(n[j], whole);
      mean[j] = m[j] + rest;
      m2[j] = q[j] - left * rest;
      safe &= !Base::unsafe(least, n[j], q[j]);
    }
    if (safe) return;
    for (int64_t j = 0; j < w; ++j) {
      if (!Base::unsafe(least, n[j], q[j]) || n[j] == 0) continue;
      mean[j] = 0;
      for (int pass = c.formula.center ? 0 : 1; pass < 2; ++pass) {
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

  void finish_pools(const Unit& u, ColumnMoments& all) const {
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
    const Act act = c.formula.act;
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
          if (!c.formula.given) {
            moments(u, 0, all.n.get(), all.mean.get(), all.m2.get());
            for (int64_t b = 1; b < blocks; ++b) {
              moments(u, b, part.n.get(), part.mean.get(), part.m2.get());
              merge(all, 0, u.width, part.n.get(), part.mean.get(), part.m2.get());
            }
            finish_pools(u, all);
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
      if (!c.formula.given) {
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
        finish_pools(u, all);
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
    const Act act = c.formula.act;
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
    Array<T> mean_g, mean_gx;
    Means(const ColumnKernel& k, const Unit& u, Expanded& st, const double* dz, const double* dzx,
          const double* n)
        : mean_g(u.width), mean_gx(u.width) {
      const Columns& g = k.g;
      for (int64_t p = 0; p < k.pools_of(u); ++p) {
        double total_g = 0, total_gx = 0, count = 0;
        for (int64_t j = p * g.group; j < (p + 1) * g.group; ++j) {
          double w = ByRow ? 1 : k.weight((u.begin + j) / g.repeat);
          total_g += w * dz[j];
          total_gx += w * dzx[j];
          count += n[j];
        }
        double own_g = 0, own_gx = 0;
        if (k.c.mean_g) {
          own_g = k.c.mean_g[k.first_pool(u) + p];
          own_gx = k.c.mean_gx[k.first_pool(u) + p];
        } else if (!k.c.formula.given && count > 0) {
          own_g = k.c.formula.center ? total_g / count : 0;
          own_gx = total_gx / count;
        }
        for (int64_t j = p * g.group; j < (p + 1) * g.group; ++j) {
          const double gx = own_gx * st.rstd[j];
          mean_g[j] = static_cast<T>(own_g * st.rstd[j] - (ByRow ? 0 : st.lag[j] * gx));
          mean_gx[j] = static_cast<T>(gx);
        }
      }
    }
  };

  // dx of a block; row_sums gets each row's sums of dz and dz * x̂ where the affine is a row's.
  void gradient(const Unit& u, Expanded& st, Means& means, int64_t block, double* row_sums) const {
    const Pointers<S> p = pointers;
    const Act act = c.formula.act;
    const int64_t columns = g.columns;
    rows_of(block, [&](auto many, int64_t r) {
      const int64_t at = offset(u, r);
      Sum<T> dbias[many.count], dweight[many.count];
      Fetch x_ahead(*this, u, p.x, r), dy_ahead(*this, u, p.dy, r);
      across<T>(u.width, [&](int64_t j, auto part) NORMKIT_LAMBDA {
        x_ahead.advance(many), dy_ahead.advance(many);
        const Operands o(st, j, part);
        const V mean_g = Affine::load(&means.mean_g[j], part);
        const V mean_gx = Affine::load(&means.mean_gx[j], part);
        NORMKIT_UNROLL
        for (int i = 0; i < many.count; ++i) {
          const int64_t down = at + i * columns + j;
          V x, dz = point(p, act, o, r + i, down, part, x);
          V g_rstd = ByRow ? fma(dz * V(weight(r + i)), o.rstd, -mean_g)
                           : fma(dz, o.scale, -mean_g);
          if constexpr (ByRow) {
            int slot = static_cast<int>(j / V::kLanes % kParts);
            dbias[i].add(slot, dz);
            dweight[i].add(slot, dz, x);
          }
          Base::write(p, down, part, fma(x, -mean_gx, g_rstd), dz);
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
    bool wants = c.dweight != nullptr, summing = wants || !c.formula.given;
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
          counts(u, 0, g.rows, n.get());
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
        counts(u, 0, g.rows, n.get());
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

}  // namespace normkit::NORMKIT_ISA
