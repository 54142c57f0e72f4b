// Rotates a step's queries and keys, and stores keys and values in the paged cache, on a CPU: the native twin of
// xla.rotate_and_write, in one pass over the rows that hold tokens. float32 or bfloat16, rotated in float32.

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

ffi::Error RotateAndWrite(ffi::ThreadPool pool, ffi::AnyBuffer qkv, ffi::Buffer<ffi::F32> cos, ffi::Buffer<ffi::F32> sin,
                          ffi::AnyBuffer k_pages, ffi::AnyBuffer v_pages, ffi::Buffer<ffi::S32> slots,
                          ffi::Buffer<ffi::S32> layer_page, ffi::Result<ffi::AnyBuffer> q,
                          ffi::Result<ffi::AnyBuffer> new_k_pages, ffi::Result<ffi::AnyBuffer> new_v_pages) {
  const auto dims = qkv.dimensions();
  const int64_t rows = dims[0], kv_heads = dims[1], group = dims[2] - 2, dim = dims[3], half = cos.dimensions()[1];
  const int64_t page_size = k_pages.dimensions()[1], layer_slot = layer_page.typed_data()[0] * page_size;
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const T* in = static_cast<const T*>(qkv.untyped_data());
    const auto rotate_row = [&](int64_t row) {
      const float *c = cos.typed_data() + row * half, *s = sin.typed_data() + row * half;
      const int64_t slot = slots.typed_data()[row];
      if (slot < page_size) return;  // padding, whose place would be in the dummy page
      for (int64_t h = 0; h < kv_heads; ++h) {
        const T* heads = in + (row * kv_heads + h) * (group + 2) * dim;
        T* queries = static_cast<T*>(q->untyped_data()) + (row * kv_heads + h) * group * dim;
        for (int64_t g = 0; g < group; ++g) rotate(heads + g * dim, c, s, half, dim, queries + g * dim);
        const int64_t place = ((layer_slot + slot) * kv_heads + h) * dim;
        rotate(heads + group * dim, c, s, half, dim, static_cast<T*>(new_k_pages->untyped_data()) + place);
        std::memcpy(static_cast<T*>(new_v_pages->untyped_data()) + place, heads + (group + 1) * dim, dim * sizeof(T));
      }
    };
    parallel_for(pool, (rows + kRows - 1) / kRows, [&](int64_t task) {
      const int64_t end = std::min((task + 1) * kRows, rows);
      for (int64_t row = task * kRows; row < end; ++row) rotate_row(row);
    });
  };
  if (new_k_pages->untyped_data() != k_pages.untyped_data() || new_v_pages->untyped_data() != v_pages.untyped_data())
    return ffi::Error::Internal("the KV cache was copied");
  qkv.element_type() == ffi::F32 ? run(float{}) : run(BFloat16{});
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_rotate_and_write, RotateAndWrite,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()          // qkv
                                  .Arg<ffi::Buffer<ffi::F32>>()   // cos
                                  .Arg<ffi::Buffer<ffi::F32>>()   // sin
                                  .Arg<ffi::AnyBuffer>()          // k_pages
                                  .Arg<ffi::AnyBuffer>()          // v_pages
                                  .Arg<ffi::Buffer<ffi::S32>>()   // slots
                                  .Arg<ffi::Buffer<ffi::S32>>()   // the layer's first page
                                  .Ret<ffi::AnyBuffer>()          // q
                                  .Ret<ffi::AnyBuffer>()          // k_pages, in place
                                  .Ret<ffi::AnyBuffer>());        // v_pages, in place
