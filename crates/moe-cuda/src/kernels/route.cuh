// Routing of one token by one block. Every option of RouterSpec, in float64 and rounded once; the order of
// preference is total (larger choice, then lower id), so ids equal those of the scalar reference.
#pragma once
#include "rows.cuh"

enum { SOFTMAX = 0, SIGMOID, SQRT_SOFTPLUS, LOGITS };
enum { NO_CORRECTION = 0, ON_SCORE, ON_LOGITS };
enum { TOP_K = 0, TOP_K_PER_GROUP, SPARSE_MIXER, HASH_TABLE, GIVEN };
enum { FROM_SCORE = 0, SOFTMAX_CHOSEN, SIGMOID_CHOSEN, JOINT_SOFTMAX };
enum { KEEP = 0, SUM, SUM_FLOOR, P_NORM };

struct Router {
  u32 experts;       // with weights
  u32 choices;       // and idle ones
  u32 logits;        // and shared ones
  u32 top_k;
  float multiplier, soft_cap;  // cap 0: none
  u32 score, correction;
  u32 groups, keep, top_two, fill_zero;  // groups 0: no limit
  u32 selection, selection_groups;
  float sparse_eps;
  u32 vocabulary;
  u32 weight_from, renormalise;
  float renormalise_by, scale;
  const float* bias;        // [choices]
  const float* per_expert;  // [experts]
  const u32* table;         // [vocabulary, top_k]
};

__device__ __forceinline__ double sigmoid(double x) { return 1.0 / (1.0 + exp(-x)); }
__device__ __forceinline__ double softplus(double x) { return fmax(x, 0.0) + log1p(exp(-fabs(x))); }
#define MINUS_INFINITY (-(double)INFINITY_F)

// Larger floats have larger keys; -0 counts as 0.
__device__ __forceinline__ u32 key_of(float x) {
  u32 b = __float_as_uint(x + 0.f);
  return b >> 31 ? ~b : b | 0x80000000u;
}

struct Scratch {
  double* logits;
  double* scores;
  double* weights;  // [top_k + shared]
  float* choice;
  u32* chosen;
  u8* taken;
};

// The `count` best of choice[from, to), best first, ties to the lowest id; by one warp.
__device__ __forceinline__ void pick(const Scratch& s, u32 from, u32 to, u32 count, u32* chosen, u32 lane) {
  if (to - from <= 256) {
    u32 keys[8];  // 0: taken, or none; no float has that key
#pragma unroll
    for (int i = 0; i < 8; i++) {
      u32 e = from + 32 * i + lane;
      keys[i] = e < to ? key_of(s.choice[e]) : 0;
    }
    for (u32 j = 0; j < count; j++) {
      u32 most = 0, id = NO_EXPERT;
#pragma unroll
      for (int i = 0; i < 8; i++) most = keys[i] > most ? keys[i] : most;
      most = __reduce_max_sync(~0u, most);
#pragma unroll
      for (int i = 7; i >= 0; i--)
        if (keys[i] == most) id = from + 32 * i + lane;
      id = __reduce_min_sync(~0u, id);
#pragma unroll
      for (int i = 0; i < 8; i++)
        if (id == from + 32 * i + lane) keys[i] = 0;
      if (lane == 0) chosen[j] = id;
    }
    return;
  }
  for (u32 j = 0; j < count; j++) {
    u32 key = 0, id = NO_EXPERT;
    for (u32 e = from + lane; e < to; e += 32)
      if (!s.taken[e]) {
        u32 k = key_of(s.choice[e]);
        if (id == NO_EXPERT || k > key) key = k, id = e;
      }
    u32 most = __reduce_max_sync(~0u, id == NO_EXPERT ? 0u : key);
    id = __reduce_min_sync(~0u, id != NO_EXPERT && key == most ? id : NO_EXPERT);
    if (lane == 0) chosen[j] = id, s.taken[id] = 1;
    __syncwarp();
  }
}

__device__ double block_max(double v, double* part) {
  for (int o = 16; o; o >>= 1) v = fmax(v, __shfl_xor_sync(~0u, v, o));
  __syncthreads();
  if ((threadIdx.x & 31) == 0) part[threadIdx.x >> 5] = v;
  __syncthreads();
  v = part[0];
  for (u32 i = 1; i < blockDim.x / 32; i++) v = fmax(v, part[i]);
  return v;
}
// phimoe: softmax at `id` over the logits within 2 eps of the largest, without `excluded`; one warp
__device__ double sparse_mixer(const Router& r, const Scratch& s, u32 id, u32 excluded, u32 lane) {
  double most = MINUS_INFINITY;
  for (u32 e = lane; e < r.logits; e += 32)
    if (e != excluded) most = fmax(most, s.logits[e]);
  for (int o = 16; o; o >>= 1) most = fmax(most, __shfl_xor_sync(~0u, most, o));
  double limit = 2.0 * (double)r.sparse_eps, sum = 0;
  // 0/0 and inf/inf are NaN and count as near
  auto far = [&](double l) { return (most - l) / fmax(fabs(l), most) > limit; };
  for (u32 e = lane; e < r.logits; e += 32)
    if (e != excluded && !far(s.logits[e])) sum += exp(s.logits[e] - most);
  for (int o = 16; o; o >>= 1) sum += __shfl_xor_sync(~0u, sum, o);
  if (most == MINUS_INFINITY || far(s.logits[id]) || id == excluded) return 0;
  return exp(s.logits[id] - most) / sum;
}

// softmax of w[0, n) in place; of nothing but -inf: zeros. One warp.
__device__ void softmax(double* w, u32 n, u32 lane) {
  double most = MINUS_INFINITY, sum = 0;
  for (u32 i = 0; i < n; i++) most = fmax(most, w[i]);
  __syncwarp();
  for (u32 i = lane; i < n; i += 32) w[i] = most == MINUS_INFINITY ? 0 : exp(w[i] - most);
  __syncwarp();
  for (u32 i = 0; i < n; i++) sum += w[i];
  __syncwarp();
  if (sum > 0)
    for (u32 i = lane; i < n; i += 32) w[i] /= sum;
  __syncwarp();
}

// `given`, [T, top_k]: ids that were chosen elsewhere, for selection GIVEN.
// `memory`: as large as Scratch needs. The logits may have been written by other blocks of this launch.
__device__ __forceinline__ void route_token(u32 t, const float* logits, u64 stride, const Router& r, const u32* input_ids, const u32* given,
                                            u32* ids, float* weights, float* shared_weights, u32* fault, u8* memory) {
  __shared__ double part[32];
  __shared__ u32 bad;
  u32 lane = threadIdx.x & 31, shared = r.logits - r.choices;
  Scratch s;
  s.logits = (double*)memory;
  s.scores = s.logits + r.logits;
  s.weights = s.scores + r.choices;
  s.choice = (float*)(s.weights + r.top_k + shared);
  s.chosen = (u32*)(s.choice + r.choices);
  s.taken = (u8*)(s.chosen + r.top_k);
  if (threadIdx.x == 0) bad = 0;
  __syncthreads();
  for (u32 e = threadIdx.x; e < r.logits; e += blockDim.x) {
    float raw = __ldcg(logits + t * stride + e);
    double l = (double)raw * (double)r.multiplier;
    if (raw == -INFINITY_F) l = MINUS_INFINITY;
    else {
      if (r.soft_cap > 0.f) l = tanh(l / (double)r.soft_cap) * (double)r.soft_cap;
      if (!finite(raw) || !finite((float)l)) {
        bad = 1;
        raise_fault(fault, FAULT_LOGIT, t, e, __float_as_uint(raw));
      }
    }
    s.logits[e] = l;
  }
  u32 row = 0;
  if (r.selection == HASH_TABLE) {
    row = input_ids[t];
    if (row >= r.vocabulary && threadIdx.x == 0) {
      bad = 1;
      raise_fault(fault, FAULT_TOKEN, t, row, row);
    }
  }
  if (r.selection == GIVEN)
    for (u32 j = threadIdx.x; j < r.top_k; j += blockDim.x) {
      u32 id = given[(u64)t * r.top_k + j];
      if (id >= r.choices) {
        bad = 1;
        raise_fault(fault, FAULT_EXPERT, t, j, id);
      }
    }
  __syncthreads();
  if (bad) {  // no experts, no weights: what follows computes with nothing that is wrong
    for (u32 j = threadIdx.x; j < r.top_k; j += blockDim.x) {
      ids[(u64)t * r.top_k + j] = NO_EXPERT;
      weights[(u64)t * r.top_k + j] = 0;
    }
    for (u32 j = threadIdx.x; j < shared; j += blockDim.x) shared_weights[(u64)t * shared + j] = 0;
    return;
  }

  // scores
  if (r.score == SOFTMAX) {
    double most = MINUS_INFINITY, sum = 0;
    for (u32 e = threadIdx.x; e < r.choices; e += blockDim.x) most = fmax(most, s.logits[e]);
    most = block_max(most, part);
    for (u32 e = threadIdx.x; e < r.choices; e += blockDim.x) {
      double v = most == MINUS_INFINITY ? 0 : exp(s.logits[e] - most);
      s.scores[e] = v;
      sum += v;
    }
    sum = block_sum(sum, part);
    for (u32 e = threadIdx.x; e < r.choices; e += blockDim.x) s.scores[e] = sum > 0 ? s.scores[e] / sum : 0;
  } else {
    for (u32 e = threadIdx.x; e < r.choices; e += blockDim.x) {
      double l = s.logits[e];
      s.scores[e] = r.score == SIGMOID ? sigmoid(l) : r.score == SQRT_SOFTPLUS ? sqrt(softplus(l)) : l == MINUS_INFINITY ? 0 : l;
    }
  }
  // what experts are chosen by; no bias brings a masked one back
  for (u32 e = threadIdx.x; e < r.choices; e += blockDim.x) {
    double base = r.correction == ON_LOGITS ? s.logits[e] : s.scores[e];
    float c = (float)base + (r.bias ? r.bias[e] : 0.f);
    c = fminf(fmaxf(c, -3.402823466e38f), 3.402823466e38f);
    s.choice[e] = s.logits[e] == MINUS_INFINITY ? -INFINITY_F : c;
    s.taken[e] = 0;
  }
  __syncthreads();
  if (threadIdx.x >= 32) return;

  // from here on one warp
  if (r.groups && r.selection < HASH_TABLE) {
    u32 size = r.choices / r.groups;
    // ratings stand where weights will, marks of kept groups behind them: both hold far more
    float* rating = (float*)part;
    for (u32 g0 = 0; g0 < r.groups; g0 += 32) {
      u32 g = g0 + lane;
      if (g < r.groups) {
        float a = -INFINITY_F, b = -INFINITY_F;
        for (u32 e = g * size; e < (g + 1) * size; e++) {
          float c = s.choice[e];
          if (c > a) b = a, a = c;
          else if (c > b) b = c;
        }
        rating[g] = r.top_two ? a + b : a;
      }
    }
    __syncwarp();
    u64 kept = 0;
    for (u32 j = 0; j < r.keep; j++) {
      u32 best = NO_EXPERT;
      for (u32 g = 0; g < r.groups; g++)
        if (!(kept >> g & 1) && (best == NO_EXPERT || rating[g] > rating[best])) best = g;
      kept |= 1ull << best;
    }
    for (u32 e = lane; e < r.choices; e += 32)
      if (!(kept >> (e / size) & 1)) {
        if (!r.fill_zero) s.choice[e] = -INFINITY_F;
        else if (s.choice[e] != -INFINITY_F) s.choice[e] = 0.f;
      }
    __syncwarp();
  }
  if (r.selection == HASH_TABLE || r.selection == GIVEN) {
    const u32* from = r.selection == GIVEN ? given + (u64)t * r.top_k : r.table + (u64)row * r.top_k;
    for (u32 j = lane; j < r.top_k; j += 32) s.chosen[j] = from[j];
  } else {
    u32 groups = r.selection == TOP_K_PER_GROUP ? r.selection_groups : 1;
    u32 size = r.choices / groups, share = r.top_k / groups;
    for (u32 g = 0; g < groups; g++) pick(s, g * size, (g + 1) * size, share, s.chosen + g * share, lane);
    __syncwarp();
    if (groups > 1 && lane == 0)  // best first; stable, so ties stay with the lowest id
      for (u32 end = 1; end < r.top_k; end++)
        for (u32 i = end; i > 0 && s.choice[s.chosen[i - 1]] < s.choice[s.chosen[i]]; i--) {
          u32 swap = s.chosen[i];
          s.chosen[i] = s.chosen[i - 1];
          s.chosen[i - 1] = swap;
        }
  }
  __syncwarp();

  // weights
  if (r.selection == SPARSE_MIXER) {
    u32 excluded = NO_EXPERT;
    for (u32 j = 0; j < r.top_k; j++) {
      double w = sparse_mixer(r, s, s.chosen[j], excluded, lane);
      if (lane == 0) s.weights[j] = w;
      excluded = s.chosen[j];
    }
    __syncwarp();
  } else {
    for (u32 j = lane; j < r.top_k; j += 32) {
      u32 id = s.chosen[j];
      double l = s.logits[id];
      s.weights[j] = r.weight_from == FROM_SCORE ? s.scores[id]
                     : r.weight_from == SIGMOID_CHOSEN ? sigmoid(l)
                     : r.weight_from == SOFTMAX_CHOSEN ? l : -softplus(-l);
    }
    for (u32 j = lane; j < shared; j += 32) s.weights[r.top_k + j] = -softplus(-s.logits[r.choices + j]);
    __syncwarp();
    if (r.weight_from == SOFTMAX_CHOSEN) softmax(s.weights, r.top_k, lane);
    if (r.weight_from == JOINT_SOFTMAX) softmax(s.weights, r.top_k + shared, lane);
  }
  double divisor = 0, by = r.renormalise_by;
  if (r.renormalise == P_NORM) {
    for (u32 j = 0; j < r.top_k; j++) divisor += pow(fabs(s.weights[j]), by);
    divisor = pow(divisor, 1.0 / by);
  } else if (r.renormalise != KEEP) {
    for (u32 j = 0; j < r.top_k; j++) divisor += s.weights[j];
    divisor = r.renormalise == SUM ? divisor + by : fmax(divisor, by);
  }
  __syncwarp();
  for (u32 j = lane; j < r.top_k; j += 32) {
    u32 id = s.chosen[j];
    double w = s.weights[j];
    if (divisor > 0) w /= divisor;
    w = w * (double)r.scale * (r.per_expert && id < r.experts ? (double)r.per_expert[id] : 1.0);
    ids[(u64)t * r.top_k + j] = id;
    weights[(u64)t * r.top_k + j] = (float)w;
  }
  for (u32 j = lane; j < shared; j += 32)
    shared_weights[(u64)t * shared + j] = (float)(s.weights[r.top_k + j] * (double)r.scale);
}
