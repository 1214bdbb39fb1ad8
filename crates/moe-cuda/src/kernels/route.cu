// Routing: one block a token.
#include "route.cuh"

extern "C" __global__ void route(const float* logits, u64 stride, Router r, const u32* input_ids, const u32* given,
                                 u32* ids, float* weights, float* shared_weights, u32* fault) {
  extern __shared__ __align__(16) u8 memory[];
  route_token(blockIdx.x, logits, stride, r, input_ids, given, ids, weights, shared_weights, fault, memory);
}
