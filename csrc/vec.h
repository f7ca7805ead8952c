// One register of an instruction set as a vector. Sums are kept as 64 bytes of lanes on all of them
// (one register of AVX-512, two of AVX2, four of 16 bytes): added up in the same order.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "call.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define NORMKIT_INLINE inline __attribute__((always_inline))
#define NORMKIT_UNROLL _Pragma("GCC unroll 16")
#define NORMKIT_INDEPENDENT _Pragma("GCC ivdep")
#define NORMKIT_LAMBDA __attribute__((always_inline))
// What is rare or slow anyway stays out of the loops, for the compiler's sake.
#define NORMKIT_APART __attribute__((noinline))

namespace normkit::NORMKIT_ISA {

constexpr int kBytes = NORMKIT_BYTES;
constexpr int kParts = 64 / kBytes;

typedef float Floats __attribute__((vector_size(kBytes)));
typedef double Doubles __attribute__((vector_size(kBytes)));
typedef float FourFloats __attribute__((vector_size(16)));
typedef double TwoDoubles __attribute__((vector_size(16)));
template <class T>
struct Registers {
  using Type = Floats;
  using Quarter = FourFloats;
};
template <>
struct Registers<double> {
  using Type = Doubles;
  using Quarter = TwoDoubles;
};

template <class T>
struct Vec {
  static constexpr int kLanes = kBytes / sizeof(T);
  using Register = typename Registers<T>::Type;
  Register r;

  Vec() = default;
  NORMKIT_INLINE Vec(Register r) : r(r) {}
  NORMKIT_INLINE Vec(T value) : r(value - Register{}) {}
};

template <class T>
NORMKIT_INLINE Vec<T> operator+(Vec<T> a, Vec<T> b) {
  return a.r + b.r;
}
template <class T>
NORMKIT_INLINE Vec<T> operator-(Vec<T> a, Vec<T> b) {
  return a.r - b.r;
}
template <class T>
NORMKIT_INLINE Vec<T> operator*(Vec<T> a, Vec<T> b) {
  return a.r * b.r;
}
template <class T>
NORMKIT_INLINE Vec<T> operator/(Vec<T> a, Vec<T> b) {
  return a.r / b.r;
}
// a * b + c, rounded once where the processor can.
#if NORMKIT_BYTES == 64
NORMKIT_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return _mm512_fmadd_ps(a.r, b.r, c.r);
}
NORMKIT_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return _mm512_fmadd_pd(a.r, b.r, c.r);
}
#elif NORMKIT_BYTES == 32
NORMKIT_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return _mm256_fmadd_ps(a.r, b.r, c.r);
}
NORMKIT_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return _mm256_fmadd_pd(a.r, b.r, c.r);
}
#else
template <class T>
NORMKIT_INLINE Vec<T> fma(Vec<T> a, Vec<T> b, Vec<T> c) {
  return a.r * b.r + c.r;
}
#endif
template <class T>
NORMKIT_INLINE Vec<T> operator-(Vec<T> a) {
  return -a.r;
}
// a <= 0 ? b : c, lane by lane; NaN gives c.
template <class T>
NORMKIT_INLINE Vec<T> where_not_positive(Vec<T> a, Vec<T> b, Vec<T> c) {
  return a.r <= 0 ? b.r : c.r;
}

// A whole vector, or its first n lanes: those beyond are read as zero and never written.
struct Whole {};
struct Part {
  int n;
};

template <class T>
struct Lanes {
  T a[Vec<T>::kLanes];
  NORMKIT_INLINE explicit Lanes(Vec<T> v) { std::memcpy(a, &v, kBytes); }
  NORMKIT_INLINE Vec<T> vec() const {
    Vec<T> v;
    std::memcpy(&v, a, kBytes);
    return v;
  }
  NORMKIT_INLINE T* begin() { return a; }
  NORMKIT_INLINE T* end() { return a + Vec<T>::kLanes; }
};

// A sum over 64 bytes of lanes in each of four slots, or in one where few are added, added up as a
// tree: i with i + half.
template <class T, int Slots = 4>
struct Sum {
  static constexpr int kQuarter = 16 / sizeof(T);
  Vec<T> s[Slots * kParts];

  NORMKIT_INLINE Sum() {
    NORMKIT_UNROLL
    for (auto& v : s) v = Vec<T>(T(0));
  }
  NORMKIT_INLINE void add(int slot, Vec<T> v) { s[slot] = s[slot] + v; }
  NORMKIT_INLINE void add(int slot, Vec<T> a, Vec<T> b) { s[slot] = fma(a, b, s[slot]); }
  // The last 16 bytes of the tree, for `last` to add up.
  NORMKIT_INLINE void total(T* last) const {
    Vec<T> t[kParts];
    NORMKIT_UNROLL
    for (int p = 0; p < kParts; ++p)
      if constexpr (Slots == 4)
        t[p] = (s[p] + s[kParts + p]) + (s[2 * kParts + p] + s[3 * kParts + p]);
      else
        t[p] = s[p];
    typename Registers<T>::Quarter q[4];
    std::memcpy(q, t, 64);
    auto h = (q[0] + q[2]) + (q[1] + q[3]);
    std::memcpy(last, &h, 16);
  }
  static NORMKIT_INLINE T last(const T* h) {
    if constexpr (sizeof(T) == 4) return (h[0] + h[2]) + (h[1] + h[3]);
    return h[0] + h[1];
  }
  NORMKIT_INLINE T total() const {
    T h[kQuarter];
    total(h);
    return last(h);
  }
};

template <class T>
NORMKIT_INLINE Vec<T> keep(Vec<T> v, Whole) {
  return v;
}
template <class T>
NORMKIT_APART Vec<T> keep(Vec<T> v, Part part) {
  Lanes<T> lanes(v);
  for (int i = part.n; i < Vec<T>::kLanes; ++i) lanes.a[i] = 0;
  return lanes.vec();
}

// v where the mask's bytes are not zero, 0 elsewhere.
template <class T>
NORMKIT_APART Vec<T> select(const uint8_t* mask, Vec<T> v, Part part) {
  Lanes<T> lanes(v);
  for (int i = 0; i < Vec<T>::kLanes; ++i)
    lanes.a[i] = i < part.n && mask[i] ? lanes.a[i] : T(0);
  return lanes.vec();
}
#if NORMKIT_BYTES == 64
NORMKIT_INLINE Vec<float> select(const uint8_t* mask, Vec<float> v, Part part) {
  auto lanes = static_cast<__mmask16>((1u << part.n) - 1);
  __m128i bytes = _mm_maskz_loadu_epi8(lanes, mask);
  return _mm512_maskz_mov_ps(_mm_test_epi8_mask(bytes, bytes), v.r);
}
#endif
template <class T>
NORMKIT_INLINE Vec<T> select(const uint8_t* mask, Vec<T> v, Whole) {
  return select(mask, v, Part{Vec<T>::kLanes});
}

// Writes kBytes or half of them past the caches, which needn't read the line first; p must be a
// multiple of that many bytes.
template <int Bytes>
NORMKIT_INLINE void stream_bytes(void* p, const void* from) {
#if defined(__x86_64__)
#if NORMKIT_BYTES == 64
  if constexpr (Bytes == 64) {
    _mm512_stream_si512(static_cast<__m512i*>(p), _mm512_loadu_si512(from));
    return;
  }
#endif
#if NORMKIT_BYTES > 16
  if constexpr (Bytes == 32) {
    _mm256_stream_si256(static_cast<__m256i*>(p), _mm256_loadu_si256(static_cast<const __m256i*>(from)));
    return;
  }
#endif
  if constexpr (Bytes == 16) {
    _mm_stream_si128(static_cast<__m128i*>(p), _mm_loadu_si128(static_cast<const __m128i*>(from)));
    return;
  }
#endif
  std::memcpy(p, from, Bytes);
}
// What was streamed is seen by other threads after this.
NORMKIT_INLINE void streamed() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

template <class T>
struct Plain {
  using V = Vec<T>;
  static NORMKIT_INLINE V load(const T* p, Whole) {
    V v;
    std::memcpy(&v, p, kBytes);
    return v;
  }
  static NORMKIT_INLINE void store(T* p, V v, Whole) { std::memcpy(p, &v, kBytes); }
  static NORMKIT_INLINE void stream(T* p, V v) { stream_bytes<kBytes>(p, &v); }
  static NORMKIT_APART V load(const T* p, Part part) {
    Lanes<T> lanes{V(T(0))};
    for (int i = 0; i < part.n; ++i) lanes.a[i] = p[i];
    return lanes.vec();
  }
  static NORMKIT_APART void store(T* p, V v, Part part) {
    Lanes<T> lanes(v);
    for (int i = 0; i < part.n; ++i) p[i] = lanes.a[i];
  }
};

template <class S>
struct Memory : Plain<S> {};

#if NORMKIT_BYTES == 64
NORMKIT_INLINE __mmask16 first(Part part) { return static_cast<__mmask16>((1u << part.n) - 1); }
NORMKIT_INLINE Vec<float> keep(Vec<float> v, Part part) {
  return _mm512_maskz_mov_ps(first(part), v.r);
}
template <>
struct Memory<float> : Plain<float> {
  using Plain<float>::load;
  using Plain<float>::store;
  static NORMKIT_INLINE V load(const float* p, Part part) {
    return V(_mm512_maskz_loadu_ps(first(part), p));
  }
  static NORMKIT_INLINE void store(float* p, V v, Part part) {
    _mm512_mask_storeu_ps(p, first(part), v.r);
  }
};
#elif NORMKIT_BYTES == 32
NORMKIT_INLINE __m256i first(Part part) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(part.n), lanes);
}
NORMKIT_INLINE Vec<float> keep(Vec<float> v, Part part) {
  return _mm256_and_ps(v.r, _mm256_castsi256_ps(first(part)));
}
template <>
struct Memory<float> : Plain<float> {
  using Plain<float>::load;
  using Plain<float>::store;
  static NORMKIT_INLINE V load(const float* p, Part part) {
    return V(_mm256_maskload_ps(p, first(part)));
  }
  static NORMKIT_INLINE void store(float* p, V v, Part part) {
    _mm256_maskstore_ps(p, first(part), v.r);
  }
};
#endif

// A vector's values in two bytes each.
typedef uint16_t Narrowed __attribute__((vector_size(kBytes / 2)));

// Values of two bytes each, widened and rounded by F.
template <class S, class F>
struct Narrow {
  using V = Vec<float>;
  static NORMKIT_INLINE V load(const S* p, Whole) {
    Narrowed v;
    std::memcpy(&v, p, kBytes / 2);
    return F::widened(v);
  }
  static NORMKIT_INLINE void store(S* p, V v, Whole) {
    Narrowed half = F::rounded(v);
    std::memcpy(p, &half, kBytes / 2);
  }
  static NORMKIT_INLINE void stream(S* p, V v) {
    Narrowed half = F::rounded(v);
    stream_bytes<kBytes / 2>(p, &half);
  }
#if NORMKIT_BYTES == 64
  static NORMKIT_INLINE V load(const S* p, Part part) {
    return F::widened((Narrowed)_mm256_maskz_loadu_epi16(first(part), p));
  }
  static NORMKIT_INLINE void store(S* p, V v, Part part) {
    _mm256_mask_storeu_epi16(p, first(part), (__m256i)F::rounded(v));
  }
#else
  static NORMKIT_APART V load(const S* p, Part part) {
    S a[V::kLanes] = {};
    for (int i = 0; i < part.n; ++i) a[i] = p[i];
    return load(a, Whole());
  }
  static NORMKIT_APART void store(S* p, V v, Part part) {
    S a[V::kLanes];
    store(a, v, Whole());
    for (int i = 0; i < part.n; ++i) p[i] = a[i];
  }
#endif
};

struct BFloat16Lanes {
  typedef uint32_t U32 __attribute__((vector_size(kBytes)));
#if NORMKIT_BYTES == 64
  static NORMKIT_INLINE U32 wide(Narrowed v) {
    return (U32)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)v);
  }
  static NORMKIT_INLINE Narrowed narrow(U32 v) {
    return (Narrowed)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)v);
  }
#elif NORMKIT_BYTES == 32
  static NORMKIT_INLINE U32 wide(Narrowed v) { return (U32)_mm256_cvtepu16_epi32((__m128i)v); }
  static NORMKIT_INLINE Narrowed narrow(U32 v) {
    auto low = _mm256_castsi256_si128((__m256i)v), high = _mm256_extracti128_si256((__m256i)v, 1);
    return (Narrowed)_mm_packus_epi32(low, high);
  }
#else
  static NORMKIT_INLINE U32 wide(Narrowed v) { return __builtin_convertvector(v, U32); }
  static NORMKIT_INLINE Narrowed narrow(U32 v) { return __builtin_convertvector(v, Narrowed); }
#endif

  static NORMKIT_INLINE Vec<float> widened(Narrowed half) {
    U32 bits = wide(half) << 16;
    Vec<float> v;
    std::memcpy(&v, &bits, kBytes);
    return v;
  }
  static NORMKIT_INLINE Narrowed rounded(Vec<float> v) {
#ifdef NORMKIT_BFLOAT16
    // The instruction takes subnormals for zero and keeps a NaN's payload: these go the long way.
    constexpr int subnormal_or_nan = 0x20 | 0x01 | 0x80;
    if (__builtin_expect(_mm512_fpclass_ps_mask(v.r, subnormal_or_nan) == 0, 1))
      return (Narrowed)_mm512_cvtneps_pbh(v.r);
#endif
    U32 bits;
    std::memcpy(&bits, &v, kBytes);
    U32 nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return narrow(v.r == v.r ? nearest : 0x7fc0u - U32{});
  }
};

#if NORMKIT_BYTES == 64
struct HalfLanes {
  static NORMKIT_INLINE Vec<float> widened(Narrowed v) {
    return _mm512_maskz_cvtph_ps(0xffff, (__m256i)v);
  }
  static NORMKIT_INLINE Narrowed rounded(Vec<float> v) {
    return (Narrowed)_mm512_maskz_cvtps_ph(0xffff, v.r, 0);
  }
};
#elif NORMKIT_BYTES == 32
struct HalfLanes {
  static NORMKIT_INLINE Vec<float> widened(Narrowed v) { return _mm256_cvtph_ps((__m128i)v); }
  static NORMKIT_INLINE Narrowed rounded(Vec<float> v) { return (Narrowed)_mm256_cvtps_ph(v.r, 0); }
};
#else
NORMKIT_INLINE float widen_half(uint16_t half) {
  uint32_t magnitude = (half & 0x7fffu) << 13, sign = (half & 0x8000u) << 16;
  float value;
  std::memcpy(&value, &magnitude, 4);
  value *= 0x1p112f;
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((half & 0x7c00u) == 0x7c00u) bits |= 0x7f800000u;
  bits |= sign;
  std::memcpy(&value, &bits, 4);
  return value;
}
NORMKIT_INLINE uint16_t round_to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {
    // Adding 0.5 lines a subnormal half up with the last bits of the sum, rounded to even.
    float small;
    std::memcpy(&small, &magnitude, 4);
    small += 0.5f;
    std::memcpy(&magnitude, &small, 4);
    return static_cast<uint16_t>(sign | (magnitude - 0x3f000000u));
  }
  magnitude += 0xc8000fffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | (magnitude >> 13));
}
struct HalfLanes {
  static NORMKIT_APART Vec<float> widened(Narrowed half) {
    Lanes<float> lanes{Vec<float>(0.0f)};
    for (int i = 0; i < Vec<float>::kLanes; ++i) lanes.a[i] = widen_half(half[i]);
    return lanes.vec();
  }
  static NORMKIT_APART Narrowed rounded(Vec<float> v) {
    Lanes<float> lanes(v);
    Narrowed half;
    for (int i = 0; i < Vec<float>::kLanes; ++i) half[i] = round_to_half(lanes.a[i]);
    return half;
  }
};
#endif

template <>
struct Memory<BFloat16> : Narrow<BFloat16, BFloat16Lanes> {};
template <>
struct Memory<Half> : Narrow<Half, HalfLanes> {};

NORMKIT_INLINE Vec<double> exp(Vec<double> x) {
  Lanes<double> lanes(x);
  for (double& v : lanes) v = std::exp(v);
  return lanes.vec();
}

// 2^k * e^r with |r| <= ln(2) / 2, the Taylor polynomial of degree 7 for e^r.
NORMKIT_INLINE Vec<float> exp(Vec<float> x) {
  using V = Vec<float>;
  typedef int32_t I32 __attribute__((vector_size(kBytes)));
  V y = x.r < -87.0f ? V(-87.0f).r : x.r;
  y = y.r > 88.0f ? V(88.0f).r : y.r;
  const V magic(12582912.0f);
  V k = (y * V(1.44269504f) + magic) - magic;
  V r = fma(k, V(2.12194440e-4f), fma(k, V(-0.693359375f), y));
  V p(1.0f / 5040);
  constexpr float taylor[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  NORMKIT_UNROLL
  for (float c : taylor) p = fma(p, r, V(c));
  I32 bits = (__builtin_convertvector(k.r, I32) + 127) << 23;
  V scale;
  std::memcpy(&scale, &bits, kBytes);
  return x.r != x.r ? x.r : (p * scale).r;
}

// The normal distribution's cdf at z, and its density up to a constant.
NORMKIT_INLINE void normal(Vec<double> z, Vec<double>& cdf, Vec<double>& bell) {
  bell = exp(z * z * Vec<double>(-0.5));
  Lanes<double> lanes(z);
  for (double& v : lanes) v = 0.5 * std::erfc(-v * 0.70710678118654752440);
  cdf = lanes.vec();
}

// The tail beyond |z| is bell * erfcx(|z| / sqrt 2) / 2, that factor a minimax polynomial in t.
NORMKIT_INLINE void normal(Vec<float> z, Vec<float>& cdf, Vec<float>& bell) {
  using V = Vec<float>;
  bell = exp(z * z * V(-0.5f));
  V u = where_not_positive(z, V(0.0f) - z, z) * V(0.707106781f);
  V t = V(1.0f) / (V(1.0f) + V(0.5f) * u);
  V p(-0.02944479f);
  constexpr float minimax[] = {0.141848f,   -0.24268548f, 0.13798155f, -0.01258348f,
                               0.10103258f, 0.12163111f,  0.14117666f, 0.14104384f};
  NORMKIT_UNROLL
  for (float c : minimax) p = fma(p, t, V(c));
  V tail = p * t * bell;
  cdf = where_not_positive(z, tail, V(1.0f) - tail);
}

}  // namespace normkit::NORMKIT_ISA
