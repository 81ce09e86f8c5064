// What the kernels of the operators share on a CPU: vectors across points, packs across channels, memory of a task.
//
// Included by one unit per instruction set, as simd.h, with everything in that unit's own namespace.
#pragma once
#include "simd.h"

namespace deform_attn {
namespace {

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

// Zeroed memory of one task.
template <class T>
class Memory {
 public:
  explicit Memory(int64_t count) : data_(static_cast<T*>(__builtin_calloc(static_cast<std::size_t>(count + 64), sizeof(T)))) {}
  ~Memory() { __builtin_free(data_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  T* get() const { return data_; }

 private:
  T* data_;
};

// Memory that is read later, where the hardware does not foresee it.
template <class T>
inline void prefetch(const T* from, int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < count; i += kLine) __builtin_prefetch(from + i);
}

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// One number for each of some points, in the compiler's own vectors.
template <class Real>
struct Lanes;
template <>
struct Lanes<float> {
  static constexpr int kSize = kVectorBytes / sizeof(float);
  typedef float R __attribute__((vector_size(kVectorBytes)));
  using Integer = int32_t;
  typedef int32_t I __attribute__((vector_size(kVectorBytes)));
};
template <>
struct Lanes<double> {
  static constexpr int kSize = kVectorBytes / sizeof(double);
  typedef double R __attribute__((vector_size(kVectorBytes)));
  using Integer = int64_t;
  typedef int64_t I __attribute__((vector_size(kVectorBytes)));
};

template <class V, class T>
inline V load_lanes(const T* from, unsigned step = 1) {
  V out;
  for (unsigned i = 0; i < sizeof(V) / sizeof(out[0]); ++i) out[i] = from[i * step];
  return out;
}

template <class V, class T>
inline void store_lanes(const V& lanes, T* to) {
  __builtin_memcpy(to, &lanes, sizeof lanes);
}

// Channels are read `count` packs at a time; what is left over is read in narrower packs, at last one by one.
template <class P, int kCount, class F>
inline int64_t in_packs(int64_t channel, int64_t dim, F&& f) {
  for (; channel + kCount * P::kSize <= dim; channel += kCount * P::kSize) f.template operator()<P, kCount>(channel);
  return channel;
}

template <class Real, class F>
inline void over_channels(int64_t dim, F&& f) {
  constexpr int kWide = kVectorBytes / sizeof(Real), kNarrow = 16 / sizeof(Real);
  constexpr int kAtOnce = kVectorBytes == 64 ? 2 : 4;  // 32 channels of float32 in one go, on AVX2 and AVX-512
  int64_t channel = in_packs<Pack<Real, kWide>, kAtOnce>(0, dim, f);
  channel = in_packs<Pack<Real, kWide>, 1>(channel, dim, f);
  if constexpr (kNarrow < kWide) channel = in_packs<Pack<Real, kNarrow>, 1>(channel, dim, f);
  in_packs<Pack<Real, 1>, 1>(channel, dim, f);
}

}  // namespace
}  // namespace deform_attn
