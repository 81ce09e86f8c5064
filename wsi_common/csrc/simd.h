// Packs of numbers, as wide as the instruction set that this unit is compiled for, and loads that widen 16-bit storage.
//
// Included by one unit per instruction set, with everything in that unit's own namespace: an inline function shared
// between units would be linked once, from whichever unit comes first, and crash on processors without its instructions.
#pragma once
#include <cstddef>
#include <cstdint>
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace deform_attn {
namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

inline float from_bits(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t to_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float widen(float value) { return value; }
inline double widen(double value) { return value; }
inline float widen(BFloat16 value) { return from_bits(static_cast<uint32_t>(value.bits) << 16); }
inline float widen(Half value) {
#if defined(__F16C__)
  return _cvtsh_ss(value.bits);
#else
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fff) << 13;
  if (magnitude >= 0x7c00u << 13) return from_bits(sign | magnitude | 0x7f800000u);  // inf, NaN
  return from_bits(sign | to_bits(from_bits(magnitude) * 0x1p112f));                // subnormals come out right too
#endif
}

inline void narrow(float value, float* out) { *out = value; }
inline void narrow(double value, double* out) { *out = value; }
inline void narrow(float value, BFloat16* out) {  // nearest, ties to even
  const uint32_t bits = to_bits(value);
  out->bits = value != value ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline void narrow(float value, Half* out) {  // nearest, ties to even
#if defined(__F16C__)
  out->bits = static_cast<uint16_t>(_cvtss_sh(value, 0));
#else
  const uint32_t bits = to_bits(value), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) half = 0x7e00;                     // NaN
  else if (magnitude >= 0x477ff000) half = 0x7c00;               // rounds beyond 65504
  else if (magnitude < 0x38800000)                               // subnormal: the adder rounds
    half = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000;
  else half = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  out->bits = static_cast<uint16_t>(sign | half);
#endif
}

// N numbers of type T in plain loops, which the compiler turns into the vectors that the unit has.
template <class T, int N>
struct Pack {
  using Real = T;
  static constexpr int kSize = N;
  T lane[N];

  static Pack all(T value) {
    Pack out;
    for (int i = 0; i < N; ++i) out.lane[i] = value;
    return out;
  }
  template <class S>
  static Pack load(const S* from) {
    Pack out;
    for (int i = 0; i < N; ++i) out.lane[i] = widen(from[i]);
    return out;
  }
  void store(T* to) const {
    for (int i = 0; i < N; ++i) to[i] = lane[i];
  }
  // this + a * b
  Pack add_product(Pack a, Pack b) const {
    Pack out;
    for (int i = 0; i < N; ++i) out.lane[i] = lane[i] + a.lane[i] * b.lane[i];
    return out;
  }
  Pack operator+(Pack other) const {
    Pack out;
    for (int i = 0; i < N; ++i) out.lane[i] = lane[i] + other.lane[i];
    return out;
  }
};

// sums[c][j] += the sum over the lanes of packs[j][c], for 4 corners c of 4 points j.
template <class T, int N>
inline void add_lane_sums(const Pack<T, N> (&packs)[4][4], T* (&sums)[4]) {
  for (int c = 0; c < 4; ++c)
    for (int j = 0; j < 4; ++j) {
      T sum = 0;
      for (int i = 0; i < N; ++i) sum += packs[j][c].lane[i];
      sums[c][j] += sum;
    }
}

#if defined(__AVX2__)
template <>
struct Pack<float, 8> {
  using Real = float;
  static constexpr int kSize = 8;
  __m256 lane;

  static Pack all(float value) { return {_mm256_set1_ps(value)}; }
  static Pack load(const float* from) { return {_mm256_loadu_ps(from)}; }
  static Pack load(const BFloat16* from) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
  }
  static Pack load(const Half* from) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))}; }
  void store(float* to) const { _mm256_storeu_ps(to, lane); }
  Pack add_product(Pack a, Pack b) const { return {_mm256_fmadd_ps(a.lane, b.lane, lane)}; }
  Pack operator+(Pack other) const { return {_mm256_add_ps(lane, other.lane)}; }
};

// Adds pairs of 128-bit halves, then pairs of floats, so that one vector ends with the sums of eight.
inline __m256 merged(const Pack<float, 8> (&packs)[4][4], int corner) {
  __m256 halves[4];
  for (int j = 0; j < 4; ++j) {
    const __m256 a = packs[j][corner].lane, b = packs[j][corner + 1].lane;
    halves[j] = _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
  }
  const __m256 a = _mm256_add_ps(_mm256_unpacklo_ps(halves[0], halves[1]), _mm256_unpackhi_ps(halves[0], halves[1]));
  const __m256 b = _mm256_add_ps(_mm256_unpacklo_ps(halves[2], halves[3]), _mm256_unpackhi_ps(halves[2], halves[3]));
  const __m256 low = _mm256_shuffle_ps(a, b, 0x44), high = _mm256_shuffle_ps(a, b, 0xee);
  return _mm256_add_ps(low, high);  // corner: points 0 to 3, corner + 1: points 0 to 3
}

inline void add_lane_sums(const Pack<float, 8> (&packs)[4][4], float* (&sums)[4]) {
  for (int c = 0; c < 4; c += 2) {
    const __m256 sum = merged(packs, c);
    _mm_storeu_ps(sums[c], _mm_add_ps(_mm_loadu_ps(sums[c]), _mm256_castps256_ps128(sum)));
    _mm_storeu_ps(sums[c + 1], _mm_add_ps(_mm_loadu_ps(sums[c + 1]), _mm256_extractf128_ps(sum, 1)));
  }
}
#endif

#if defined(__AVX512F__)
template <>
struct Pack<float, 16> {
  using Real = float;
  static constexpr int kSize = 16;
  __m512 lane;

  static Pack all(float value) { return {_mm512_set1_ps(value)}; }
  static Pack load(const float* from) { return {_mm512_loadu_ps(from)}; }
  static Pack load(const BFloat16* from) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
  }
  static Pack load(const Half* from) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))};
  }
  void store(float* to) const { _mm512_storeu_ps(to, lane); }
  Pack add_product(Pack a, Pack b) const { return {_mm512_fmadd_ps(a.lane, b.lane, lane)}; }
  Pack operator+(Pack other) const { return {_mm512_add_ps(lane, other.lane)}; }
};

// The four corners of one point: 128-bit lane c ends with four partial sums of corner c.
inline __m512 by_corner(const Pack<float, 16> (&corners)[4]) {
  const __m512 a = corners[0].lane, b = corners[1].lane, c = corners[2].lane, d = corners[3].lane;
  const __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  const __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee));
  return _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
}

inline void add_lane_sums(const Pack<float, 16> (&packs)[4][4], float* (&sums)[4]) {
  const __m512 p0 = by_corner(packs[0]), p1 = by_corner(packs[1]), p2 = by_corner(packs[2]), p3 = by_corner(packs[3]);
  const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(p0, p1), _mm512_unpackhi_ps(p0, p1));
  const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(p2, p3), _mm512_unpackhi_ps(p2, p3));
  const __m512 sum = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
  const __m128 by_lane[4] = {_mm512_extractf32x4_ps(sum, 0), _mm512_extractf32x4_ps(sum, 1),
                             _mm512_extractf32x4_ps(sum, 2), _mm512_extractf32x4_ps(sum, 3)};
  for (int c = 0; c < 4; ++c) _mm_storeu_ps(sums[c], _mm_add_ps(_mm_loadu_ps(sums[c]), by_lane[c]));
}
#endif

}  // namespace
}  // namespace deform_attn
