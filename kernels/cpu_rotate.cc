// Rotates a step's queries and keys, and stores keys and values in the paged cache, on a CPU: the native twin of
// xla.rotate_and_write, in one pass over the rows that hold tokens. float32 or bfloat16, rotated in float32. There is one
// array of pages where a key is its own value.

#include "cpu_common.h"

namespace {

constexpr int64_t kRows = 32;  // of a task

// The first half of each pair of dimensions with the second, in the two-halves layout of Hugging Face; the dimensions
// after both halves are left as they are.
template <typename T>
void rotate(const T* x, const float* cos, const float* sin, int64_t half, int64_t dim, T* out) {
  for (int64_t d = 0; d < half; d += kLanes) {
    const int64_t some = std::min<int64_t>(kLanes, half - d);
    const Vec c = load_some(cos + d, some), s = load_some(sin + d, some);
    const Vec first = load_some(x + d, some), second = load_some(x + half + d, some);
    store_some(out + d, first * c - second * s, some);
    store_some(out + half + d, second * c + first * s, some);
  }
  std::memcpy(out + 2 * half, x + 2 * half, (dim - 2 * half) * sizeof(T));
}

ffi::Error RotateAndWrite(ffi::AnyBuffer qkv, ffi::Buffer<ffi::F32> cos, ffi::Buffer<ffi::F32> sin,
                          ffi::Buffer<ffi::S32> slots, ffi::Buffer<ffi::S32> layer_page, ffi::RemainingArgs pages,
                          ffi::Result<ffi::AnyBuffer> q, ffi::RemainingRets new_pages) {
  const auto dims = qkv.dimensions();
  const int64_t arrays = pages.size(), rows = dims[0], kv_heads = dims[1], width = dims[2], dim = dims[3];
  const int64_t group = width - arrays, half = cos.dimensions()[1];
  void* stored[2];  // keys, and values if they are not the keys
  for (int64_t i = 0; i < arrays; ++i) {
    stored[i] = (*new_pages.get<ffi::AnyBuffer>(i))->untyped_data();
    if (stored[i] != pages.get<ffi::AnyBuffer>(i)->untyped_data()) return ffi::Error::Internal("the KV cache was copied");
  }
  const int64_t page_size = pages.get<ffi::AnyBuffer>(0)->dimensions()[1];
  const int64_t layer_slot = layer_page.typed_data()[0] * page_size;
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const T* in = static_cast<const T*>(qkv.untyped_data());
    const auto rotate_row = [&](int64_t row) {
      const float *c = cos.typed_data() + row * half, *s = sin.typed_data() + row * half;
      const int64_t slot = slots.typed_data()[row];
      if (slot < page_size) return;  // padding, whose place would be in the dummy page
      for (int64_t h = 0; h < kv_heads; ++h) {
        const T* heads = in + (row * kv_heads + h) * width * dim;
        T* queries = static_cast<T*>(q->untyped_data()) + (row * kv_heads + h) * group * dim;
        for (int64_t g = 0; g < group; ++g) rotate(heads + g * dim, c, s, half, dim, queries + g * dim);
        const int64_t place = ((layer_slot + slot) * kv_heads + h) * dim;
        rotate(heads + group * dim, c, s, half, dim, static_cast<T*>(stored[0]) + place);
        if (arrays == 2) std::memcpy(static_cast<T*>(stored[1]) + place, heads + (group + 1) * dim, dim * sizeof(T));
      }
    };
    parallel_for((rows + kRows - 1) / kRows, [&](int64_t task) {
      const int64_t end = std::min((task + 1) * kRows, rows);
      for (int64_t row = task * kRows; row < end; ++row) rotate_row(row);
    });
  };
  qkv.element_type() == ffi::F32 ? run(float{}) : run(BFloat16{});
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_rotate_and_write, RotateAndWrite,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()          // qkv
                                  .Arg<ffi::Buffer<ffi::F32>>()   // cos
                                  .Arg<ffi::Buffer<ffi::F32>>()   // sin
                                  .Arg<ffi::Buffer<ffi::S32>>()   // slots
                                  .Arg<ffi::Buffer<ffi::S32>>()   // the layer's first page
                                  .RemainingArgs()                // pages
                                  .Ret<ffi::AnyBuffer>()          // q
                                  .RemainingRets());              // pages, in place
