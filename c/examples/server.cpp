// One cross-attention layer of Llama 3.2 Vision 11B as a server decodes with it: project the query, attend to the cached image tokens, project back.
//
//     server [steps]        random weights; prints the time of a step. Exits with 77 where there is no GPU.
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <vector>

#include "fastfuse.h"
#include "gpu.h"

namespace {

void check(ffs_status status) {
  if (status != ffs_ok) throw std::runtime_error(ffs_last_error());
}

std::vector<uint8_t> random_bytes(size_t n) {
  std::vector<uint8_t> bytes(n);
  for (uint8_t &byte : bytes) byte = static_cast<uint8_t>(std::rand() >> 7);
  return bytes;
}

std::vector<uint16_t> random_bf16(size_t n) {
  std::vector<uint16_t> values(n);
  for (uint16_t &value : values) value = static_cast<uint16_t>(0x3c00 | (std::rand() & 0x80ff) | (std::rand() & 1) << 15);  // about +-0.01 to 0.06
  return values;
}

template <class T>
void *on_device(const std::vector<T> &values) {
  return gpu_copy_of(values.data(), values.size() * sizeof(T));
}

// A weight with nested scales, as bitsandbytes' double quantization stores it; a real server maps a checkpoint here.
ffs_nf4 random_weight(int64_t N, int64_t K) {
  const size_t blocks = static_cast<size_t>(N * K / 64);
  std::vector<float> code(256), absmax((blocks + 255) / 256, 0.05f), offset(1, 0.05f);
  for (size_t i = 0; i < code.size(); i++) code[i] = (static_cast<float>(i) - 128) / 256;
  ffs_nf4 w{};
  w.N = N;
  w.K = K;
  w.packed = on_device(random_bytes(static_cast<size_t>(N * K / 2)));
  w.index = static_cast<uint8_t *>(on_device(random_bytes(blocks)));
  w.code = static_cast<float *>(on_device(code));
  w.absmax = static_cast<float *>(on_device(absmax));
  w.offset = static_cast<float *>(on_device(offset));
  return w;
}

class Layer {
 public:
  Layer(int64_t batch, int64_t image_tokens) : b(batch), query(random_weight(hidden, hidden)), output(random_weight(hidden, hidden)) {
    const size_t cached = static_cast<size_t>(b * kv_heads * image_tokens * head_dim), activations = static_cast<size_t>(b * hidden);
    lora.R = 16;
    lora.scaling = 2;
    lora.dtype = FFS_BF16;
    lora.a = on_device(random_bf16(static_cast<size_t>(lora.R * hidden)));
    lora.b = on_device(random_bf16(static_cast<size_t>(lora.R * hidden)));
    q = gpu_alloc(2 * activations);
    attended = gpu_alloc(2 * activations);
    attention.dtype = FFS_BF16;
    attention.b = b;
    attention.hq = heads;
    attention.hkv = kv_heads;
    attention.s = 1;
    attention.s_e = image_tokens;
    attention.d = head_dim;
    attention.q = q;
    attention.k = on_device(random_bf16(cached));
    attention.v = on_device(random_bf16(cached));
    attention.out = attended;
    const int64_t rows[] = {hidden, head_dim, hidden}, cache[] = {kv_heads * image_tokens * head_dim, image_tokens * head_dim, head_dim};
    for (int i = 0; i < 3; i++) {
      attention.stride_q[i] = attention.stride_out[i] = rows[i];
      attention.stride_k[i] = attention.stride_v[i] = cache[i];
    }
    attention.lengths = static_cast<int32_t *>(on_device(std::vector<int32_t>(static_cast<size_t>(b), static_cast<int32_t>(image_tokens))));
    attention.scale = 1 / std::sqrt(static_cast<float>(head_dim));
    // One workspace serves every call: they follow one another on the stream.
    size_t linear = 0, attend = 0;
    check(ffs_nf4_linear_workspace(FFS_BF16, b, &query, &lora, &linear));
    check(ffs_cross_attention_workspace(&attention, &attend));
    workspace_bytes = linear > attend ? linear : attend;
    workspace = gpu_alloc(workspace_bytes);
  }

  // x, out [b, 4096] in bf16. Only launches: may be captured in a CUDA graph.
  void step(CUstream stream, const void *x, void *out) {
    check(ffs_nf4_linear(stream, FFS_BF16, b, x, hidden, &query, &lora, nullptr, q, workspace, workspace_bytes));
    check(ffs_cross_attention(stream, &attention, workspace, workspace_bytes));
    check(ffs_nf4_linear(stream, FFS_BF16, b, attended, hidden, &output, &lora, nullptr, out, workspace, workspace_bytes));
  }

  static constexpr int64_t heads = 32, kv_heads = 8, head_dim = 128, hidden = heads * head_dim;

 private:
  int64_t b;
  ffs_nf4 query, output;
  ffs_lora lora{};
  ffs_attention attention{};
  void *q, *attended, *workspace;
  size_t workspace_bytes;
};

}  // namespace

int main(int argc, char **argv) try {
  const int steps = argc > 1 ? std::atoi(argv[1]) : 100;
  if (const char *reason = gpu_open()) {
    std::printf("no GPU: %s\n", reason);
    return 77;
  }
  const int64_t batch = 1, image_tokens = 4 * 1601;
  Layer layer(batch, image_tokens);
  void *x = on_device(random_bf16(static_cast<size_t>(batch * Layer::hidden))), *out = gpu_alloc(2 * batch * Layer::hidden);
  layer.step(nullptr, x, out);  // loads the kernels
  gpu_check(gpu.synchronize(), "cuCtxSynchronize");
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < steps; i++) layer.step(nullptr, x, out);
  gpu_check(gpu.synchronize(), "cuCtxSynchronize");
  const std::chrono::duration<double, std::micro> took = std::chrono::steady_clock::now() - start;
  std::printf("%.1f us a step, %lld image tokens\n", took.count() / steps, static_cast<long long>(image_tokens));
  return 0;
} catch (const std::exception &error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
