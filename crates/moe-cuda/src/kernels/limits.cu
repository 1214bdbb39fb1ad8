// What a GPU can do at most: measured beside what it does.
#include "common.cuh"

// Reads `n` times 16 bytes.
extern "C" __global__ void read_all(const uint4* from, u64 n, u32* out) {
  u32 sum = 0;
  u64 step = (u64)gridDim.x * blockDim.x, i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  for (; i + 3 * step < n; i += 4 * step) {
    uint4 a = from[i], b = from[i + step], c = from[i + 2 * step], d = from[i + 3 * step];
    sum ^= a.x ^ a.y ^ a.z ^ a.w ^ b.x ^ b.y ^ b.z ^ b.w ^ c.x ^ c.y ^ c.z ^ c.w ^ d.x ^ d.y ^ d.z ^ d.w;
  }
  for (; i < n; i += step) sum ^= from[i].x;
  if (sum == 0x12345678u) *out = sum;
}

// 32 multiply-adds a round and thread, in chains of their own.
extern "C" __global__ void multiply_add(u32 rounds, float a, float b, float* out) {
  float d[32];
#pragma unroll
  for (int i = 0; i < 32; i++) d[i] = (float)(threadIdx.x + i);
  for (u32 r = 0; r < rounds; r++)
#pragma unroll
    for (int i = 0; i < 32; i++) d[i] = fmaf(d[i], a, b);
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 32; i++) sum += d[i];
  if (sum == 1.2345f) *out = sum;
}
