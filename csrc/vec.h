// Vectors of 64 bytes on every instruction set, so that results are bitwise the same on all of them:
// one AVX-512 register, two of AVX2, four of 16 bytes elsewhere.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "call.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define NORMKIT_INLINE inline __attribute__((always_inline))
#define NORMKIT_LAMBDA __attribute__((always_inline))
// What is rare or slow anyway stays out of the loops, for the compiler's sake.
#define NORMKIT_APART __attribute__((noinline))

namespace normkit::NORMKIT_ISA {

#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
#elif defined(__AVX2__)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif
constexpr int kRegisters = 64 / kRegisterBytes;

template <class T>
struct Vec {
  static constexpr int kLanes = 64 / sizeof(T);
  typedef T Register __attribute__((vector_size(kRegisterBytes)));
  Register r[kRegisters];

  Vec() = default;
  NORMKIT_INLINE Vec(T value) {
    for (auto& q : r) q = value - Register{};
  }
  template <class F>
  static NORMKIT_INLINE Vec map(F f) {
    Vec v;
    for (int i = 0; i < kRegisters; ++i) v.r[i] = f(i);
    return v;
  }
};

template <class T>
NORMKIT_INLINE Vec<T> operator+(Vec<T> a, Vec<T> b) {
  return Vec<T>::map([&](int i) { return a.r[i] + b.r[i]; });
}
template <class T>
NORMKIT_INLINE Vec<T> operator-(Vec<T> a, Vec<T> b) {
  return Vec<T>::map([&](int i) { return a.r[i] - b.r[i]; });
}
template <class T>
NORMKIT_INLINE Vec<T> operator*(Vec<T> a, Vec<T> b) {
  return Vec<T>::map([&](int i) { return a.r[i] * b.r[i]; });
}
template <class T>
NORMKIT_INLINE Vec<T> operator/(Vec<T> a, Vec<T> b) {
  return Vec<T>::map([&](int i) { return a.r[i] / b.r[i]; });
}
// a <= 0 ? b : c, lane by lane; NaN gives c.
template <class T>
NORMKIT_INLINE Vec<T> where_not_positive(Vec<T> a, Vec<T> b, Vec<T> c) {
  return Vec<T>::map([&](int i) { return a.r[i] <= 0 ? b.r[i] : c.r[i]; });
}
template <class T>
NORMKIT_INLINE Vec<T> clamp(Vec<T> a, T low, T high) {
  return Vec<T>::map([&](int i) {
    auto l = low - typename Vec<T>::Register{}, h = high - typename Vec<T>::Register{};
    auto b = a.r[i] < l ? l : a.r[i];
    return b > h ? h : b;
  });
}

// The lanes summed as a tree: i with i + half.
template <class T>
NORMKIT_INLINE T sum(Vec<T> v) {
  typedef T Half128 __attribute__((vector_size(16)));
  Half128 q[4];
  std::memcpy(q, &v, 64);
  Half128 s = (q[0] + q[2]) + (q[1] + q[3]);
  if constexpr (sizeof(T) == 4) return (s[0] + s[2]) + (s[1] + s[3]);
  return s[0] + s[1];
}

// A whole vector, or its first n lanes: those beyond are read as zero and never written.
struct Whole {};
struct Part {
  int n;
};

template <class T>
NORMKIT_INLINE Vec<T> keep(Vec<T> v, Whole) {
  return v;
}
template <class T>
NORMKIT_APART Vec<T> keep(Vec<T> v, Part part) {
  T a[Vec<T>::kLanes];
  std::memcpy(a, &v, 64);
  for (int i = 0; i < Vec<T>::kLanes; ++i) a[i] = i < part.n ? a[i] : T(0);
  std::memcpy(&v, a, 64);
  return v;
}

template <class T>
struct Plain {
  using V = Vec<T>;
  static NORMKIT_INLINE V load(const T* p, Whole) {
    V v;
    std::memcpy(&v, p, 64);
    return v;
  }
  static NORMKIT_INLINE void store(T* p, V v, Whole) { std::memcpy(p, &v, 64); }
  static NORMKIT_APART V load(const T* p, Part part) {
    T a[V::kLanes] = {};
    for (int i = 0; i < part.n; ++i) a[i] = p[i];
    return load(a, Whole());
  }
  static NORMKIT_APART void store(T* p, V v, Part part) {
    T a[V::kLanes];
    std::memcpy(a, &v, 64);
    for (int i = 0; i < part.n; ++i) p[i] = a[i];
  }
};

template <class S>
struct Memory : Plain<S> {};

#if defined(__AVX512F__)
NORMKIT_INLINE __mmask16 lanes_of(Part part) {
  return static_cast<__mmask16>((1u << part.n) - 1);
}
NORMKIT_INLINE Vec<float> keep(Vec<float> v, Part part) {
  v.r[0] = _mm512_maskz_mov_ps(lanes_of(part), v.r[0]);
  return v;
}
template <>
struct Memory<float> : Plain<float> {
  using Plain<float>::load;
  using Plain<float>::store;
  static NORMKIT_INLINE V load(const float* p, Part part) {
    V v;
    v.r[0] = _mm512_maskz_loadu_ps(lanes_of(part), p);
    return v;
  }
  static NORMKIT_INLINE void store(float* p, V v, Part part) {
    _mm512_mask_storeu_ps(p, lanes_of(part), v.r[0]);
  }
};
#endif

typedef uint16_t U16 __attribute__((vector_size(32)));
typedef uint32_t U32 __attribute__((vector_size(64)));

// Sixteen values of two bytes each, widened and rounded by F.
template <class S, class F>
struct Narrow {
  using V = Vec<float>;
  static NORMKIT_INLINE V load(const S* p, Whole) { return F::widen(p); }
  static NORMKIT_INLINE void store(S* p, V v, Whole) { F::round(p, v); }
  static NORMKIT_APART V load(const S* p, Part part) {
    S a[16] = {};
    for (int i = 0; i < part.n; ++i) a[i] = p[i];
    return F::widen(a);
  }
  static NORMKIT_APART void store(S* p, V v, Part part) {
    S a[16];
    F::round(a, v);
    for (int i = 0; i < part.n; ++i) p[i] = a[i];
  }
};

struct BFloat16Lanes {
  static NORMKIT_INLINE Vec<float> widen(const BFloat16* p) {
    U16 half;
    std::memcpy(&half, p, 32);
    U32 bits = __builtin_convertvector(half, U32) << 16;
    Vec<float> v;
    std::memcpy(&v, &bits, 64);
    return v;
  }
  static NORMKIT_INLINE void round(BFloat16* p, Vec<float> v) {
    U32 bits;
    std::memcpy(&bits, &v, 64);
    U32 nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    nearest = (bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : nearest;
    U16 half = __builtin_convertvector(nearest, U16);
    std::memcpy(p, &half, 32);
  }
};

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
    float small, magic = 0.5f;
    std::memcpy(&small, &magnitude, 4);
    small += magic;
    std::memcpy(&magnitude, &small, 4);
    return static_cast<uint16_t>(sign | (magnitude - 0x3f000000u));
  }
  magnitude += 0xc8000fffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | (magnitude >> 13));
}

#if defined(__AVX2__)
#define NORMKIT_HALF NORMKIT_INLINE
#else
#define NORMKIT_HALF NORMKIT_APART
#endif
struct HalfLanes {
  static NORMKIT_HALF Vec<float> widen(const Half* p) {
    Vec<float> v;
#if defined(__AVX512F__)
    v.r[0] = _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
    for (int i = 0; i < 2; ++i)
      v.r[i] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p) + i));
#else
    float a[16];
    for (int i = 0; i < 16; ++i) a[i] = widen_half(p[i].bits);
    std::memcpy(&v, a, 64);
#endif
    return v;
  }
  static NORMKIT_HALF void round(Half* p, Vec<float> v) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtps_ph(0xffff, v.r[0], 0));
#elif defined(__AVX2__)
    for (int i = 0; i < 2; ++i)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p) + i, _mm256_cvtps_ph(v.r[i], 0));
#else
    float a[16];
    std::memcpy(a, &v, 64);
    for (int i = 0; i < 16; ++i) p[i].bits = round_to_half(a[i]);
#endif
  }
};

template <>
struct Memory<BFloat16> : Narrow<BFloat16, BFloat16Lanes> {};
template <>
struct Memory<Half> : Narrow<Half, HalfLanes> {};

// v where the mask's bytes are not zero, 0 elsewhere.
template <class T>
NORMKIT_APART Vec<T> select(const uint8_t* mask, Vec<T> v, Part part) {
  T a[Vec<T>::kLanes];
  std::memcpy(a, &v, 64);
  for (int i = 0; i < Vec<T>::kLanes; ++i) a[i] = i < part.n && mask[i] ? a[i] : T(0);
  std::memcpy(&v, a, 64);
  return v;
}
template <class T>
NORMKIT_INLINE Vec<T> select(const uint8_t* mask, Vec<T> v, Whole) {
  return select(mask, v, Part{Vec<T>::kLanes});
}

template <class T>
NORMKIT_APART Vec<T> exp(Vec<T> x) {
  T a[Vec<T>::kLanes];
  if constexpr (sizeof(T) == 8) {
    std::memcpy(a, &x, 64);
    for (auto& v : a) v = std::exp(v);
    std::memcpy(&x, a, 64);
    return x;
  } else {
    // 2^k * e^r with |r| <= ln(2) / 2, the Taylor polynomial of degree 7 for e^r.
    Vec<float> y = clamp(x, -87.0f, 88.0f);
    Vec<float> k = y * Vec<float>(1.44269504f);
    const Vec<float> magic(12582912.0f);
    k = (k + magic) - magic;
    Vec<float> r = (y - k * Vec<float>(0.693359375f)) - k * Vec<float>(-2.12194440e-4f);
    Vec<float> p(1.0f / 5040);
    constexpr float taylor[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
    for (float c : taylor) p = p * r + Vec<float>(c);
    typedef int32_t I32 __attribute__((vector_size(kRegisterBytes)));
    return Vec<float>::map([&](int i) {
      I32 bits = (__builtin_convertvector(k.r[i], I32) + 127) << 23;
      typename Vec<float>::Register scale;
      std::memcpy(&scale, &bits, kRegisterBytes);
      auto e = p.r[i] * scale;
      return x.r[i] != x.r[i] ? x.r[i] : e;
    });
  }
}

// The normal distribution's cdf and density at z, up to the density's constant.
template <class T>
NORMKIT_APART void normal(Vec<T> z, Vec<T>& cdf, Vec<T>& bell) {
  bell = exp(z * z * Vec<T>(T(-0.5)));
  if constexpr (sizeof(T) == 8) {
    T a[Vec<T>::kLanes];
    std::memcpy(a, &z, 64);
    for (auto& v : a) v = 0.5 * std::erfc(-v * 0.70710678118654752440);
    std::memcpy(&cdf, a, 64);
  } else {
    // The tail beyond |z| is bell * erfcx(|z| / sqrt 2) / 2, that factor a polynomial in t.
    Vec<float> u = where_not_positive(z, Vec<float>(0.0f) - z, z) * Vec<float>(0.707106781f);
    Vec<float> t = Vec<float>(1.0f) / (Vec<float>(1.0f) + Vec<float>(0.5f) * u);
    Vec<float> p(-0.02944479f);
    constexpr float minimax[] = {0.141848f,   -0.24268548f, 0.13798155f, -0.01258348f,
                                 0.10103258f, 0.12163111f,  0.14117666f, 0.14104384f};
    for (float c : minimax) p = p * t + Vec<float>(c);
    Vec<float> tail = p * t * bell;
    cdf = where_not_positive(z, tail, Vec<float>(1.0f) - tail);
  }
}

}  // namespace normkit::NORMKIT_ISA
