// Rows of slots in the order of the plan, and in the order of the slots: what is done to them beside the
// products.
#include "rows.cuh"

// The expert of sorted position `p`: the last one that begins at or before it.
__device__ __forceinline__ u32 expert_of(const u32* offsets, u32 experts, u32 p) {
  u32 low = 0, high = experts;  // offsets[low] <= p < offsets[high]
  while (high - low > 1) {
    u32 middle = (low + high) / 2;
    if (offsets[middle] <= p) low = middle;
    else high = middle;
  }
  return low;
}

// to[p] = x[order[p] / top_k] (* factors[order[p]]) for every planned position p. One block a row.
extern "C" __global__ void gather_slots(Rows x, const u32* order, const u32* offsets, u32 experts, u32 top_k, const float* factors, Rows to) {
  u32 planned = offsets[experts];
  for (u32 p = blockIdx.x; p < planned; p += gridDim.x) {
    u32 slot = order[p], row = slot / top_k;
    float factor = factors ? factors[slot] : 1.f;
    for (u32 c = threadIdx.x; c < x.cols; c += blockDim.x)
      store_float(to.data, to.type, (u64)p * to.stride + c, load_float(x.data, x.type, (u64)row * x.stride + c) * factor);
  }
}

// As quantise_rows of rows.cu, of the planned rows; a given scale is that of the row's expert.
extern "C" __global__ void quantise_slots(Rows x, const u32* offsets, u32 experts, u32 kind, u32 group, const float* scales) {
  u32 groups = (x.cols + group - 1) / group, lane = threadIdx.x & 31, planned = offsets[experts];
  u64 i = ((u64)blockIdx.x * blockDim.x + threadIdx.x) >> 5;
  if (i >= (u64)x.rows * groups) return;
  u32 r = (u32)(i / groups), g = (u32)(i - (u64)r * groups);
  if (r >= planned) return;
  float given = scales ? scales[expert_of(offsets, experts, r)] : 0.f;
  quantise_group(x, r, g, kind, group, given, lane);
}

// Norm of each slot's row in place, by its expert's weight [experts, cols]. One block a slot.
extern "C" __global__ void norm_slots(Rows y, const u32* ids, u32 experts, const float* weights, float eps, u32 offset, u32 first) {
  __shared__ double part[32];
  u32 slot = blockIdx.x, e = ids[slot];
  if (e >= experts) return;
  const float* weight = weights + (u64)e * y.cols;
  float scale = rms_scale(y, slot, weight, eps, offset, first, part);
  for (u32 c = threadIdx.x; c < y.cols; c += blockDim.x) {
    u64 at = (u64)slot * y.stride + c;
    store_float(y.data, y.type, at, load_float(y.data, y.type, at) * scale * (weight[c] + (offset ? 1.f : 0.f)));
  }
}

// ids[i] = i % count: every row has a slot at each expert.
extern "C" __global__ void dense_ids(u32* ids, u32 n, u32 count) {
  for (u32 i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) ids[i] = i % count;
}

extern "C" __global__ void fill(float* to, u32 n, float value) {
  for (u32 i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) to[i] = value;
}

// y[t] *= sigmoid(x[t] . gate), the sum in float64. One block a row.
extern "C" __global__ void sigmoid_gate(Rows y, Rows x, const float* gate) {
  __shared__ double part[32];
  u32 t = blockIdx.x;
  double sum = 0;
  for (u32 c = threadIdx.x; c < x.cols; c += blockDim.x) sum += (double)load_float(x.data, x.type, (u64)t * x.stride + c) * gate[c];
  sum = block_sum(sum, part);
  float factor = (float)(1.0 / (1.0 + exp(-sum)));
  for (u32 c = threadIdx.x; c < y.cols; c += blockDim.x) {
    u64 at = (u64)t * y.stride + c;
    store_float(y.data, y.type, at, load_float(y.data, y.type, at) * factor);
  }
}

// Everything after the branches: out[t] = norm((y + shared_factor * shared) * half + bias) * multiplier
// + x * sum of the weights of identity choices. One block a row; y is overwritten.
struct Finish {
  Rows y, shared, x, out;  // shared.data, x.data null: none
  const float* bias;       // [cols] or null
  const float* norm;       // [cols] or null
  const u32* ids;          // [T, top_k], read where x is
  const float* weights;
  u32 top_k, experts, choices;
  float shared_factor, half, multiplier, eps;
  u32 offset, first;
};

extern "C" __global__ void finish(Finish f) {
  __shared__ double part[32];
  u32 t = blockIdx.x;
  float identity = 0;
  if (f.x.data)
    for (u32 j = 0; j < f.top_k; j++) {
      u32 id = f.ids[(u64)t * f.top_k + j];
      if (id >= f.experts && id < f.choices) identity += f.weights[(u64)t * f.top_k + j];
    }
  for (u32 c = threadIdx.x; c < f.y.cols; c += blockDim.x) {
    u64 at = (u64)t * f.y.stride + c;
    float v = load_float(f.y.data, f.y.type, at);
    if (f.shared.data) v += f.shared_factor * load_float(f.shared.data, f.shared.type, (u64)t * f.shared.stride + c);
    v *= f.half;
    if (f.bias) v += f.bias[c];
    store_float(f.y.data, f.y.type, at, v);
  }
  // each thread reads again what it wrote itself
  float scale = 1;
  if (f.norm) scale = rms_scale(f.y, t, f.norm, f.eps, f.offset, f.first, part);
  for (u32 c = threadIdx.x; c < f.y.cols; c += blockDim.x) {
    float v = load_float(f.y.data, f.y.type, (u64)t * f.y.stride + c);
    if (f.norm) v = v * scale * (f.norm[c] + (f.offset ? 1.f : 0.f));
    v *= f.multiplier;
    if (f.x.data) v += identity * load_float(f.x.data, f.x.type, (u64)t * f.x.stride + c);
    store_float(f.out.data, f.out.type, (u64)t * f.out.stride + c, v);
  }
}
