// The kernels for values of bfloat16.
#include "kernels.cuh"

namespace deform_attn {
template cudaError_t launch_forward(const CudaCall<__nv_bfloat16, float>&, cudaStream_t);
template cudaError_t launch_backward(const CudaCall<__nv_bfloat16, float>&, cudaStream_t);
template cudaError_t launch_from_fixed(const CudaCall<__nv_bfloat16, float>&, cudaStream_t);
}  // namespace deform_attn
