// The kernels for values of float.
#include "kernels.cuh"

namespace deform_attn {
template cudaError_t launch_forward(const CudaCall<float, float>&, cudaStream_t);
template cudaError_t launch_backward(const CudaCall<float, float>&, cudaStream_t);
template cudaError_t launch_from_fixed(const CudaCall<float, float>&, cudaStream_t);
}  // namespace deform_attn
