// Maps of tokens (batch, height, width, dim), channels last. The stride between tokens may exceed dim, so that half of
// the channels of a wider map can be read and written in place.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>

#include "vec.h"

namespace spatial_mamba {

// A batch of maps, channels last.
struct Shape {
  template <typename T>
  int64_t chunks() const {  // vectors of channels
    return chunks_of<T>(dim);
  }
  template <typename T>
  int lanes(int64_t channel) const {  // number of channels in the vector that starts at `channel`
    return static_cast<int>(std::min<int64_t>(kLanes<T>, dim - channel));
  }
  int64_t token(int64_t b, int64_t i) const { return (b * height + i) * width; }  // the first token of row i

  int64_t batch, height, width, dim;
};

inline Shape shape_of(const at::Tensor& x) { return {x.size(0), x.size(1), x.size(2), x.size(3)}; }

// Rows of one image in memory that holds `kept` of them: row i replaces row i - kept.
template <typename io>
struct Rows {
  io* data;
  int64_t stride;  // elements from one row to the next
  int64_t kept;

  io* operator[](int64_t i) const { return data + i % kept * stride; }
};

// The rows of image b of contiguous maps.
template <typename io>
Rows<io> rows_of(io* data, const Shape& shape, int64_t b, int64_t dim) {
  return {data + shape.token(b, 0) * dim, shape.width * dim, shape.height};
}

// Parts of an image: just enough to keep all threads busy, and at most `most`.
inline int64_t parts_per_image(int64_t batch, int64_t most) {
  const int64_t wanted = at::divup(at::get_num_threads(), std::max<int64_t>(batch, 1));
  return std::clamp<int64_t>(wanted, 1, most);
}

// Calls work(item) for all items, on all threads; a thread gets at least `grain` of them.
template <typename Work>
void for_items(int64_t items, int64_t grain, Work&& work) {
  at::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) work(item);
  });
}

template <typename io>
struct Tokens {
  io* data;
  int64_t stride;  // elements from one token to the next

  io* operator[](int64_t token) const { return data + token * stride; }
};

inline int64_t token_stride(const at::Tensor& x, const char* name) {
  const int64_t height = x.size(1), width = x.size(2), dim = x.size(3);
  // Strides of dimensions of size 1 are arbitrary, so use the innermost dimension that is larger.
  const int64_t stride = width > 1    ? x.stride(2)
                         : height > 1 ? x.stride(1)
                         : x.size(0) > 1 ? x.stride(0)
                                         : dim;
  const bool even = (dim == 1 || x.stride(3) == 1) && (height == 1 || x.stride(1) == width * stride) &&
                    (x.size(0) <= 1 || x.stride(0) == height * width * stride) && stride >= dim;
  TORCH_CHECK_VALUE(even || x.numel() == 0, name, " must have channels last and evenly spaced tokens, got strides ",
                    x.strides(), " for sizes ", x.sizes());
  return stride;
}

template <typename io>
Tokens<const io> read_tokens(const at::Tensor& x, const char* name) {
  return {x.const_data_ptr<io>(), token_stride(x, name)};
}

template <typename io>
Tokens<io> write_tokens(const at::Tensor& x, const char* name) {
  return {x.mutable_data_ptr<io>(), token_stride(x, name)};
}

}  // namespace spatial_mamba
