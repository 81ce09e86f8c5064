// The kernels for values of half.
#include "kernels.cuh"

namespace deform_attn {
template cudaError_t launch_forward(const CudaCall<__half, float>&, cudaStream_t);
template cudaError_t launch_backward(const CudaCall<__half, float>&, cudaStream_t);
template cudaError_t launch_from_fixed(const CudaCall<__half, float>&, cudaStream_t);
}  // namespace deform_attn
