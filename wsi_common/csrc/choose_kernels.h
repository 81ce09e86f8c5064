// Run-time choice of the instruction set, so that one build runs on every processor of the architecture.
//
// For the `choose_kernels.cpp` of an operator, after the `call.h` that declares its `Kernels`.
#pragma once
#include <atomic>
#include <cstring>

namespace deform_attn {
namespace {

bool runs(const Kernels* kernels) {
  if (kernels == nullptr) return false;
#if defined(__x86_64__)
  if (std::strcmp(kernels->name, "avx512") == 0)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
  if (std::strcmp(kernels->name, "avx2") == 0)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
  return true;
}

const Kernels* find(const char* name) {
  const Kernels* fastest_first[] = {kernels_avx512(), kernels_avx2(), kernels_baseline()};
  for (const Kernels* kernels : fastest_first)
    if (runs(kernels) && (std::strcmp(name, "auto") == 0 || std::strcmp(name, kernels->name) == 0)) return kernels;
  return nullptr;
}

std::atomic<const Kernels*> chosen{nullptr};

// The name now in force, null when this build or processor does not have it.
const char* choose(const char* name) {
  const Kernels* found = find(name);
  if (found == nullptr) return nullptr;
  chosen.store(found);
  return found->name;
}

}  // namespace

const Kernels& kernels() {
  if (chosen.load() == nullptr) chosen.store(find("auto"));
  return *chosen.load();
}

}  // namespace deform_attn
