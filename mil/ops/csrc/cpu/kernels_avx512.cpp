// AVX-512 (F, BW, DQ, VL): Skylake-X, Ice Lake, Zen 4 and later.
#include "kernel.h"

namespace deform_attn {
#if defined(__AVX512F__)
const Kernels* kernels_avx512() {
  static const Kernels kernels{"avx512", forward, backward};
  return &kernels;
}
#else
const Kernels* kernels_avx512() { return nullptr; }
#endif

}  // namespace deform_attn
