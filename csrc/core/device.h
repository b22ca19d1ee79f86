// CUDA kernels live in a library of their own beside the Python module, `_C_cuda.so`, opened when a CUDA
// tensor first comes: the module itself needs no CUDA to load. The library exports `hrmcore_<op>(const Args&,
// void* stream)`, which returns nullptr or what went wrong (csrc/core/cuda.cuh).
#pragma once

#include <string>

namespace hrmcore {

// The address of an op's kernel. Throws std::runtime_error without a library or without that op in it, saying
// why.
void* device_kernel(const char* op);

// For tests: from now on CPU tensors go to the kernels of the library at `path`, which emulates CUDA; "" ends
// it.
void emulate_cuda(const std::string& path);
bool emulating_cuda();

}  // namespace hrmcore
