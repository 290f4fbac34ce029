// Stands in for CUDA's header of asynchronous copies: they happen when the thread waits for them; until then the target
// is NaN.
#pragma once

#include <cstddef>

namespace cuda_emulator {

void copy_later(void* target, const void* source, size_t bytes);
void finish_copies();

}  // namespace cuda_emulator

inline void __pipeline_memcpy_async(void* target, const void* source, size_t bytes) {
  cuda_emulator::copy_later(target, source, bytes);
}
inline void __pipeline_commit() {}
inline void __pipeline_wait_prior(size_t) { cuda_emulator::finish_copies(); }
