// Recurrent layers on a CPU, token by token: the native twin of recurrent.run_rows. A head's memory fits into a core's
// own cache, so a token costs a pass or two over it and no tiles are needed; sums have one order, so outputs do not
// depend on how a prompt is cut.

#include <cmath>
#include <vector>

#include "cpu_common.h"

namespace {

constexpr int kColumns = 4;  // vectors of a pass

struct Chunk {
  int64_t begin, end;
};

// One token on some columns of a head's memory, [key_dim, value_dim].
template <int kVectors>
void step(const float* query, const float* key, const float* value, float fading, float rate, bool corrects,
          int64_t key_dim, int64_t value_dim, float* memory, float* out) {
  Vec known[kVectors] = {};
  if (corrects)
    for (int64_t d = 0; d < key_dim; ++d)
      for (int i = 0; i < kVectors; ++i) known[i] += key[d] * load(memory + d * value_dim + i * kLanes);
  Vec change[kVectors], read[kVectors] = {};
  for (int i = 0; i < kVectors; ++i) change[i] = rate * (load(value + i * kLanes) - fading * known[i]);
  for (int64_t d = 0; d < key_dim; ++d) {
    for (int i = 0; i < kVectors; ++i) {
      float* place = memory + d * value_dim + i * kLanes;
      const Vec now = fading * load(place) + key[d] * change[i];
      store(place, now);
      read[i] += query[d] * now;
    }
  }
  for (int i = 0; i < kVectors; ++i) store(out + i * kLanes, read[i]);
}

// The same on columns that fill no vector.
void step_rest(const float* query, const float* key, const float* value, float fading, float rate, bool corrects,
               int64_t key_dim, int64_t value_dim, int64_t count, float* memory, float* out) {
  for (int64_t i = 0; i < count; ++i) {
    float known = 0, read = 0;
    if (corrects)
      for (int64_t d = 0; d < key_dim; ++d) known += key[d] * memory[d * value_dim + i];
    const float change = rate * (value[i] - fading * known);
    for (int64_t d = 0; d < key_dim; ++d) {
      float& place = memory[d * value_dim + i];
      place = fading * place + key[d] * change;
      read += query[d] * place;
    }
    out[i] = read;
  }
}

ffi::Error Recur(ffi::Buffer<ffi::F32> query, ffi::Buffer<ffi::F32> key,
                          ffi::Buffer<ffi::F32> value, ffi::Buffer<ffi::F32> decay, ffi::Buffer<ffi::F32> rate,
                          ffi::Buffer<ffi::F32> memory, ffi::Buffer<ffi::S32> slots, ffi::Buffer<ffi::PRED> is_first,
                          ffi::Buffer<ffi::S32> layer, bool corrects, ffi::Result<ffi::Buffer<ffi::F32>> out,
                          ffi::Result<ffi::Buffer<ffi::F32>> new_memory) {
  const auto dims = memory.dimensions();
  const int64_t num_slots = dims[1], key_heads = dims[2], each = dims[3], key_dim = dims[4], value_dim = dims[5];
  const int64_t rows = slots.dimensions()[0], heads = key_heads * each, head_size = key_dim * value_dim;
  if (new_memory->untyped_data() != memory.untyped_data()) return ffi::Error::Internal("the state was copied");
  float* const layer_memory = new_memory->typed_data() + layer.typed_data()[0] * num_slots * heads * head_size;
  const int32_t* const slot_of = slots.typed_data();
  std::vector<Chunk> chunks;
  for (int64_t begin = 0, end; begin < rows; begin = end) {
    for (end = begin + 1; end < rows && slot_of[end] == slot_of[begin];) ++end;
    if (slot_of[begin] < num_slots) chunks.push_back({begin, end});
  }
  parallel_for(static_cast<int64_t>(chunks.size()) * heads, [&](int64_t task) {
    const Chunk chunk = chunks[task / heads];
    const int64_t head = task % heads;
    float* mine = layer_memory + (slot_of[chunk.begin] * heads + head) * head_size;
    if (is_first.typed_data()[chunk.begin]) std::memset(mine, 0, head_size * sizeof(float));
    for (int64_t row = chunk.begin; row < chunk.end; ++row) {
      const float* q = query.typed_data() + (row * key_heads + head / each) * key_dim;
      const float* k = key.typed_data() + (row * key_heads + head / each) * key_dim;
      const float* v = value.typed_data() + (row * heads + head) * value_dim;
      float* read = out->typed_data() + (row * heads + head) * value_dim;
      const float fading = std::exp(decay.typed_data()[row * heads + head]), b = rate.typed_data()[row * heads + head];
      int64_t i = 0;
      for (; i + kColumns * kLanes <= value_dim; i += kColumns * kLanes)
        step<kColumns>(q, k, v + i, fading, b, corrects, key_dim, value_dim, mine + i, read + i);
      for (; i + kLanes <= value_dim; i += kLanes)
        step<1>(q, k, v + i, fading, b, corrects, key_dim, value_dim, mine + i, read + i);
      step_rest(q, k, v + i, fading, b, corrects, key_dim, value_dim, value_dim - i, mine + i, read + i);
    }
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_recur, Recur,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Buffer<ffi::F32>>()   // query
                                  .Arg<ffi::Buffer<ffi::F32>>()   // key
                                  .Arg<ffi::Buffer<ffi::F32>>()   // value
                                  .Arg<ffi::Buffer<ffi::F32>>()   // decay
                                  .Arg<ffi::Buffer<ffi::F32>>()   // rate
                                  .Arg<ffi::Buffer<ffi::F32>>()   // memory
                                  .Arg<ffi::Buffer<ffi::S32>>()   // slots
                                  .Arg<ffi::Buffer<ffi::PRED>>()  // is_first
                                  .Arg<ffi::Buffer<ffi::S32>>()   // layer
                                  .Attr<bool>("corrects")
                                  .Ret<ffi::Buffer<ffi::F32>>()   // what is read
                                  .Ret<ffi::Buffer<ffi::F32>>());  // memory, in place
