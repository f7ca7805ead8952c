// Loops: over blocks on torch's threads, over the vectors of a row; and the memory they work in.
#pragma once

#include <cstdlib>
#include <new>

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

}  // namespace normkit::NORMKIT_ISA
