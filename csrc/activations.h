// The activations after a norm, and their slopes.
#pragma once

#include "vec.h"

namespace normkit::NORMKIT_ISA {

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

}  // namespace normkit::NORMKIT_ISA
