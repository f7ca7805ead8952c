// The kernels of one instruction set. Whatever is summed is summed in an order that depends on the
// shape alone, so results are bitwise the same on any number of threads and on AVX2 as on AVX-512:
// work is cut into blocks, a block's sums are merged in double in the order of the blocks, and the
// schedule (which thread, fused or in two phases) changes no bit.
//
// Nothing of the standard library is instantiated here: a template compiled for AVX-512 must not be
// the one that the linker keeps for every machine.
#pragma once

#include <type_traits>

#include "columns.h"
#include "rows.h"

namespace normkit::NORMKIT_ISA {

// Calls f with the kind of the call as a constant; of float64, which is bound by memory, fewer.
template <class S, class F>
void by_kind(const Call& c, F f) {
  if (c.mask)
    f(std::integral_constant<Kind, kMasked>());
  else if (c.formula.act != Act::none || sizeof(S) == 8)
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
