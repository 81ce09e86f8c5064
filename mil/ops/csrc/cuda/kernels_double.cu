// The kernels for values of double.
#include "kernels.cuh"

namespace deform_attn {
template cudaError_t launch_forward(const CudaCall<double, double>&, cudaStream_t);
template cudaError_t launch_backward(const CudaCall<double, double>&, cudaStream_t);
template cudaError_t launch_from_fixed(const CudaCall<double, double>&, cudaStream_t);
}  // namespace deform_attn
