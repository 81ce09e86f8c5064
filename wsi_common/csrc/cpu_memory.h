// Tensors on the CPU: how kernels are told of their storage, large pages for results, zeros from all threads.
#pragma once
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstring>

#include "cpu_kernels.h"
#include "stable_tensor.h"

namespace deform_attn {
namespace {

Storage storage_of(const Tensor& value) {
  switch (value.scalar_type()) {
    case ScalarType::Double: return Storage::kDouble;
    case ScalarType::BFloat16: return Storage::kBFloat16;
    case ScalarType::Half: return Storage::kHalf;
    default: return Storage::kFloat;
  }
}

// Asks for large pages under a result that is about to be written for the first time: one fault in place of 512.
void* large_pages(const Tensor& tensor) {
  void* data = tensor.mutable_data_ptr();
#if defined(__linux__)
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  const ScalarType type = tensor.scalar_type();
  const uintptr_t size = type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2;
  const uintptr_t start = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(tensor.numel()) * size) / kPage * kPage;
  if (end > start + kPage) madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);
#endif
  return data;
}

// Zeros from all threads: with few queries this is most of the work of backward.
void zero(void* data, int64_t bytes) {
  constexpr int64_t kGrain = int64_t{1} << 20;
  torch::stable::parallel_for(0, bytes, kGrain, [&](int64_t begin, int64_t end) {
    std::memset(static_cast<char*>(data) + begin, 0, static_cast<size_t>(end - begin));
  });
}

}  // namespace
}  // namespace deform_attn
