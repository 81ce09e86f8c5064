// AVX2 with FMA and F16C: Haswell, Zen and later.
#include "kernel.h"

namespace deform_attn {
#if defined(__AVX2__)
const Kernels* kernels_avx2() {
  static const Kernels kernels{"avx2", forward, backward};
  return &kernels;
}
#else
const Kernels* kernels_avx2() { return nullptr; }
#endif

}  // namespace deform_attn
