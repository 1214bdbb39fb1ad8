// Weights as checkpoints store them: codes [experts, rows, cols], scales and zero points by block.
#pragma once
#include "common.cuh"

enum { E_F32 = 0, E_F16, E_BF16, E_E4M3, E_E5M2, E_INT8, E_UINT8, E_UINT4, E_E2M1 };
enum { S_F32 = 0, S_F16, S_BF16, S_E8M0, S_E4M3 };

// A value is (code - zero) * scale * global, rounded once. Strides count bytes of codes, and scales.
struct Stored {
  const u8* codes;
  const void* scales;   // null: none
  const u8* zeros;      // one a scale; null: `zero` for all
  const float* global;  // [experts]; null: none
  const float* bias;    // [experts, rows]; null: none
  u64 expert_bytes, row_bytes, expert_scales;
  u32 rows, cols;
  u32 scale_type, group_rows, group_cols, row_scales;
  float zero;
};

__device__ __forceinline__ float load_scale(const void* p, u32 type, u64 i) {
  switch (type) {
    case S_F32: return ((const float*)p)[i];
    case S_F16: return f16_to_f32(((const u16*)p)[i]);
    case S_BF16: return bf16_to_f32(((const u16*)p)[i]);
    case S_E8M0: return e8m0_to_f32(((const u8*)p)[i]);
    default: return e4m3_to_f32(((const u8*)p)[i]);
  }
}

// Code `k` of a row, as bits (E_F32: not used).
template <int E> __device__ __forceinline__ u32 load_code(const u8* row, u32 k) {
  if constexpr (E == E_UINT4 || E == E_E2M1) return row[k >> 1] >> (4 * (k & 1)) & 15;
  else if constexpr (E == E_F16 || E == E_BF16) return ((const u16*)row)[k];
  else return row[k];
}

template <int E> __device__ __forceinline__ float element(const u8* row, u32 k) {
  if constexpr (E == E_F32) return ((const float*)row)[k];
  u32 c = load_code<E>(row, k);
  if constexpr (E == E_F16) return f16_to_f32((u16)c);
  if constexpr (E == E_BF16) return bf16_to_f32(c);
  if constexpr (E == E_E4M3) return e4m3_to_f32(c);
  if constexpr (E == E_E5M2) return e5m2_to_f32(c);
  if constexpr (E == E_INT8) return (float)(signed char)c;
  if constexpr (E == E_E2M1) return e2m1_to_f32(c);
  return (float)c;
}

// Values k0 .. k0 + N of a row; 0 beyond the matrix.
template <int E, int N>
__device__ __forceinline__ void decode(const Stored& m, u32 expert, u32 r, u32 k0, float (&out)[N]) {
  if (r >= m.rows) {
#pragma unroll
    for (int i = 0; i < N; i++) out[i] = 0;
    return;
  }
  const u8* row = m.codes + expert * m.expert_bytes + r * m.row_bytes;
  float scale = 1, zero = m.zero;
  double global = m.global ? m.global[expert] : 1.0;
  u32 group = NO_EXPERT;
#pragma unroll
  for (int i = 0; i < N; i++) {
    u32 k = k0 + i;
    if (k >= m.cols) {
      out[i] = 0;
      continue;
    }
    if (m.scales && k / m.group_cols != group) {
      group = k / m.group_cols;
      u64 at = expert * m.expert_scales + (u64)(r / m.group_rows) * m.row_scales + group;
      scale = load_scale(m.scales, m.scale_type, at);
      if (m.zeros) zero = (float)m.zeros[at];
    }
    float v = element<E>(row, k) - zero;
    out[i] = m.global ? (float)((double)v * scale * global) : v * scale;
  }
}
