// What a kernel is given: pointers and geometry that ops.cpp has checked.
#pragma once

#include <cstdint>

namespace normkit {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// The letters that are pooled, as normkit.formula.pool has them; and what follows the affine.
enum class Summed : int64_t { ns, s, ks, k };
enum class Act : int64_t { none, relu, leaky_relu, silu, gelu };

struct Pool {
  Summed summed;
  int64_t groups;    // channels are cut into these; of batch norm, ghost batches, 0 for one batch
  int64_t trailing;  // the last axes, where these are pooled instead of the channels
};

// What is computed, wherever it lies in memory.
struct Formula {
  Pool pool;
  double eps;
  bool center;
  Act act;
  bool given = false;  // the statistics come with the call
};

// Pools that lie along memory: `segments` runs of `length` elements each, `jump` further on after
// each `period` pools. The affine is a scalar of each segment, at (pool % period) * pool_step +
// segment * segment_step, or from there on a vector along the run.
struct Rows {
  int64_t pools, segments, length, pool_stride, segment_stride, jump;
  int64_t period, pool_step, segment_step;
  bool vector_affine;
};

// Pools that lie across memory: `outer` matrices of rows x columns, statistics down the columns,
// `group` neighbouring columns in one pool. The affine is one of each row, or of `repeat`
// neighbouring columns.
struct Columns {
  int64_t outer, rows, columns, group, repeat;
  bool affine_per_row;
};

struct Call {
  const void *x, *residual;  // storage dtype
  const void *base, *add;    // where there are any, x is still to be written: base + add
  const uint8_t* mask;
  const void *weight, *bias;  // compute dtype, never null
  Formula formula;
  bool stream;  // what is written is too large to be found in a cache later
  double* mean;    // per pool; read where given, or in a backward
  void *rstd, *var;  // per pool, compute dtype; rstd is read where given
  double *count, *variance;  // per pool, where moments alone are wanted; y is null then
  void* y;
  // A backward reads these, and writes to dx, dz and the sums of each affine entry.
  const void *dy, *dtotal, *output;
  // dx is null where the sums alone are wanted; the means of g and of g * x̂ over each pool may be
  // there where the statistics are given, and are 0 otherwise.
  void *dx, *dz;
  double *dweight, *dbias;
  const double *mean_g, *mean_gx;
};

// Runs task(begin, end) over parts of [0, n) on torch's threads.
using Task = void (*)(int64_t begin, int64_t end, void* context);
void parallel(int64_t n, int64_t grain, Task task, void* context);
int64_t threads();

struct Kernels {
  void (*rows_forward)(const Rows&, const Call&);
  void (*rows_backward)(const Rows&, const Call&);
  void (*columns_forward)(const Columns&, const Call&);
  void (*columns_backward)(const Columns&, const Call&);
};

enum Storage { kFloat, kBFloat16, kHalf, kDouble };
namespace portable {
extern const Kernels kernels[4];
}
namespace avx2 {
extern const Kernels kernels[4];
}
namespace avx512 {
extern const Kernels kernels[4];
}
namespace avx512_bf16 {
extern const Kernels kernels;  // of bfloat16
}

}  // namespace normkit
