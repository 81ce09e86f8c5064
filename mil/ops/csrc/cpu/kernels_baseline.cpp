// What every processor of the architecture has (SSE2 on x86-64, NEON on 64-bit Arm).
#include "kernel.h"

namespace deform_attn {
const Kernels* kernels_baseline() {
  static const Kernels kernels{"baseline", forward, backward};
  return &kernels;
}

}  // namespace deform_attn
