// What a layer does between its products, of bfloat16 rows and in float32: root-mean-square norm (arXiv 1910.07467), and the
// sum with what it adds to. XLA makes several operations of a norm, and runs them on threads of its own, which the helpers of
// native calls (cpu_parallel.h) leave no processor: a layer of native calls only is faster than its parts.

#include <cmath>

#include "cpu_common.h"

namespace {

constexpr int64_t kTaskValues = 16 * 1024;  // that one thread passes over faster than another is told of them

BFloat16* values(ffi::AnyBuffer buffer) { return static_cast<BFloat16*>(buffer.untyped_data()); }

// y = x / root mean square * (weight + offset)
void norm_row(const BFloat16* x, const BFloat16* weight, float eps, float offset, int64_t size, BFloat16* y) {
  const auto each = [size](auto f) {
    for (int64_t i = 0; i < size; i += kLanes) f(i, std::min<int64_t>(kLanes, size - i));
  };
  Vec squares = {};
  each([&](int64_t i, int64_t some) {
    const Vec value = load_some(x + i, some);
    squares += value * value;
  });
  const float scale = 1 / std::sqrt(sum_of(squares) / size + eps);
  each([&](int64_t i, int64_t some) {
    store_some(y + i, load_some(x + i, some) * scale * (load_some(weight + i, some) + offset), some);
  });
}

ffi::Error Norm(float eps, float offset, ffi::AnyBuffer x, ffi::AnyBuffer weight,
                ffi::Result<ffi::AnyBuffer> y) {
  const int64_t size = weight.element_count(), rows = x.element_count() / size;
  const int64_t each = std::max<int64_t>(1, kTaskValues / size);
  parallel_for((rows + each - 1) / each, [&](int64_t task) {
    for (int64_t row = task * each; row < std::min(rows, (task + 1) * each); ++row)
      norm_row(values(x) + row * size, values(weight), eps, offset, size, values(*y) + row * size);
  });
  return ffi::Error::Success();
}

ffi::Error Add(ffi::AnyBuffer x, ffi::AnyBuffer y, ffi::Result<ffi::AnyBuffer> sum) {
  const int64_t count = x.element_count();
  parallel_for((count + kTaskValues - 1) / kTaskValues, [&](int64_t task) {
    const int64_t end = std::min(count, (task + 1) * kTaskValues);
    for (int64_t i = task * kTaskValues; i < end; i += kLanes) {
      const int64_t some = std::min<int64_t>(kLanes, end - i);
      store_some(values(*sum) + i, load_some(values(x) + i, some) + load_some(values(y) + i, some), some);
    }
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_norm, Norm,
                              ffi::Ffi::Bind()
                                  .Attr<float>("eps")
                                  .Attr<float>("offset")
                                  .Arg<ffi::AnyBuffer>()    // x
                                  .Arg<ffi::AnyBuffer>()    // weight
                                  .Ret<ffi::AnyBuffer>());  // y

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_add, Add,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()    // x
                                  .Arg<ffi::AnyBuffer>()    // y
                                  .Ret<ffi::AnyBuffer>());  // x + y
