// Rows of numbers: conversion, normalisation, quantisation, sums. One pass over memory each.
#include "rows.cuh"

// to = from. With a fault word, values that are not finite raise it.
extern "C" __global__ void convert(Rows from, Rows to, u32* fault) {
  u64 n = (u64)from.rows * from.cols;
  for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (u64)gridDim.x * blockDim.x) {
    u32 r = (u32)(i / from.cols), c = (u32)(i - (u64)r * from.cols);
    float v = load_float(from.data, from.type, r * from.stride + c);
    if (fault && !finite(v)) raise_fault(fault, FAULT_HIDDEN, r, c, __float_as_uint(v));
    store_float(to.data, to.type, r * to.stride + c, v);
  }
}

// One block a row: to = from / sqrt(mean(from^2) + eps) * (w or 1 + w) * factor; with `first` of
// from * w in place of from, and no weight after.
extern "C" __global__ void rms_norm(Rows from, Rows to, const float* weight, float eps, u32 offset, u32 first, float factor) {
  __shared__ double part[32];
  u32 r = blockIdx.x;
  float scale = rms_scale(from, r, weight, eps, offset, first, part);
  for (u32 c = threadIdx.x; c < from.cols; c += blockDim.x) {
    float w = weight ? weight[c] + (offset ? 1.f : 0.f) : 1.f;
    float v = load_float(from.data, from.type, r * from.stride + c);
    store_float(to.data, to.type, r * to.stride + c, v * scale * w * factor);
  }
}

// One warp a group: quantises and dequantises in place.
extern "C" __global__ void quantise_rows(Rows x, u32 kind, u32 group, float given) {
  u32 groups = (x.cols + group - 1) / group, lane = threadIdx.x & 31;
  u64 i = ((u64)blockIdx.x * blockDim.x + threadIdx.x) >> 5;
  if (i >= (u64)x.rows * groups) return;
  u32 r = (u32)(i / groups), g = (u32)(i - (u64)r * groups);
  quantise_group(x, r, g, kind, group, given, lane);
}

// One warp for each (ROWS rows, OUTPUTS outputs): out = x * w^T (+ bias).
template <int ROWS, int OUTPUTS>
__device__ __forceinline__ void product(const Rows& x, const Rows& w, const float* bias, bool whole, const Rows& out) {
  u32 lane = threadIdx.x & 31, o0 = (blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5)) * OUTPUTS;
  if (o0 >= w.rows) return;
  for (u32 r0 = blockIdx.y * ROWS; r0 < x.rows; r0 += gridDim.y * ROWS) {
    float acc[ROWS][OUTPUTS];
    // what lies beyond the last one is that one again, and is not stored
    u64 rows[ROWS], outputs[OUTPUTS];
#pragma unroll
    for (u32 r = 0; r < ROWS; r++) rows[r] = (u64)(r0 + r < x.rows ? r0 + r : x.rows - 1) * x.stride;
#pragma unroll
    for (u32 o = 0; o < OUTPUTS; o++) outputs[o] = (u64)(o0 + o < w.rows ? o0 + o : w.rows - 1) * w.stride;
    dots<ROWS, OUTPUTS>(x, rows, w, outputs, whole, lane, acc);
#pragma unroll
    for (u32 r = 0; r < ROWS; r++)
#pragma unroll
      for (u32 o = 0; o < OUTPUTS; o++)
        if (lane == 0 && r0 + r < x.rows && o0 + o < w.rows)
          store_float(out.data, out.type, (u64)(r0 + r) * out.stride + o0 + o, acc[r][o] + (bias ? bias[o0 + o] : 0.f));
  }
}
extern "C" __global__ void __launch_bounds__(128) linear_one(Rows x, Rows w, const float* bias, u32 whole, Rows out) { product<1, 1>(x, w, bias, whole, out); }
extern "C" __global__ void __launch_bounds__(128) linear_few(Rows x, Rows w, const float* bias, u32 whole, Rows out) { product<4, 1>(x, w, bias, whole, out); }
extern "C" __global__ void __launch_bounds__(128) linear_many(Rows x, Rows w, const float* bias, u32 whole, Rows out) { product<8, 4>(x, w, bias, whole, out); }

// out[t] = scale * sum over j of w[t, j] * y[t k + j], in slot order, f32. Slots whose id is no expert
// are left out. A sum that is not finite raises the fault.
extern "C" __global__ void combine(Rows y, const u32* ids, const float* weights, u32 experts, u32 top_k, float scale, Rows out, u32* fault) {
  u64 n = (u64)out.rows * out.cols;
  for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (u64)gridDim.x * blockDim.x) {
    u32 t = (u32)(i / out.cols), c = (u32)(i - (u64)t * out.cols);
    float sum = 0;
    for (u32 j = 0; j < top_k; j++) {
      u64 slot = (u64)t * top_k + j;
      if (ids[slot] >= experts) continue;
      float v = load_float(y.data, y.type, slot * y.stride + c);
      sum = weights ? __fadd_rn(sum, __fmul_rn(weights[slot], v)) : __fadd_rn(sum, v);
    }
    sum *= scale;
    if (!finite(sum)) raise_fault(fault, FAULT_OUTPUT, t, c, __float_as_uint(sum));
    store_float(out.data, out.type, t * out.stride + c, sum);
  }
}

// y = a * y + b * f[row] * x; without f the factor is b.
extern "C" __global__ void scale_add(Rows y, Rows x, const float* by_row, float a, float b) {
  u64 n = (u64)y.rows * y.cols;
  for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (u64)gridDim.x * blockDim.x) {
    u32 r = (u32)(i / y.cols), c = (u32)(i - (u64)r * y.cols);
    float v = load_float(y.data, y.type, r * y.stride + c) * a;
    if (x.data) v = __fadd_rn(v, __fmul_rn(by_row ? b * by_row[r] : b, load_float(x.data, x.type, r * x.stride + c)));
    store_float(y.data, y.type, r * y.stride + c, v);
  }
}

// f[t] = sum of the weights of a token's choices that are no expert with weights: identity experts.
extern "C" __global__ void identity_weights(const u32* ids, const float* weights, u32 experts, u32 choices, u32 tokens, u32 top_k, float* out) {
  u32 t = blockIdx.x * blockDim.x + threadIdx.x;
  if (t >= tokens) return;
  float sum = 0;
  for (u32 j = 0; j < top_k; j++) {
    u32 id = ids[(u64)t * top_k + j];
    if (id >= experts && id < choices) sum += weights[(u64)t * top_k + j];
  }
  out[t] = sum;
}
