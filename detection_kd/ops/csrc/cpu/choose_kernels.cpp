// Run-time choice of the instruction set.
#include "call.h"
// after the kernels that it chooses from
#include "choose_kernels.h"

extern "C" const char* ms_deform_attn_choose_kernels(const char* name) { return deform_attn::choose(name); }
