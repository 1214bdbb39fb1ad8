// The plan: slots sorted by expert (stable, so an expert meets its rows in row order), and tiles of at
// most `tile` rows of one expert. All on the device; no atomic decides an order.
#include "common.cuh"

#define MOST_WARPS 32
#define MOST_ROUNDS 4  // of 32 slots, by each warp

struct Plan {
  const u32* ids;  // [slots]: local expert ids; others have no place
  u32 slots, experts, tile, rounds;
  u32* counts;   // [blocks, experts]: scratch where there is more than one block
  u32* offsets;  // [experts + 1]
  u32* order;    // [slots]: slots by expert; the rest is left as it was
  u32* place;    // [slots]: where a slot stands in `order`, or NO_EXPERT
  uint2* tiles;  // {expert, first row of the tile among all}
  u32* tile_count;
};

__device__ __forceinline__ u32 slot_of(const Plan& p, u32 round) { return ((blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5)) * p.rounds + round) * 32 + (threadIdx.x & 31); }

// This thread's slots' experts, one a round: all loads at once.
__device__ __forceinline__ void load_ids(const Plan& p, u32 (&ids)[MOST_ROUNDS]) {
#pragma unroll
  for (u32 round = 0; round < MOST_ROUNDS; round++) {
    u32 slot = slot_of(p, round);
    ids[round] = round < p.rounds && slot < p.slots ? p.ids[slot] : NO_EXPERT;
  }
#pragma unroll
  for (u32 round = 0; round < MOST_ROUNDS; round++)
    if (ids[round] >= p.experts) ids[round] = NO_EXPERT;
}

// This block's slots of each expert, by warp: counts[warp][expert]. peers: the lanes with a slot of the same expert.
__device__ __forceinline__ void histogram(const Plan& p, const u32 (&ids)[MOST_ROUNDS], u32 (&peers)[MOST_ROUNDS], u16* counts) {
  u32 warp = threadIdx.x >> 5, lane = threadIdx.x & 31, all = (blockDim.x >> 5) * p.experts;
  for (u32 i = threadIdx.x; i < all; i += blockDim.x) counts[i] = 0;
  __syncthreads();
#pragma unroll
  for (u32 round = 0; round < MOST_ROUNDS; round++) {
    if (round == p.rounds) break;
    u32 id = ids[round];
    peers[round] = __match_any_sync(~0u, id);
    if (id != NO_EXPERT && lane == __ffs(peers[round]) - 1) counts[warp * p.experts + id] += __popc(peers[round]);
    __syncwarp();
  }
  __syncthreads();
}

extern "C" __global__ void __launch_bounds__(MOST_WARPS * 32) plan_count(Plan p) {
  extern __shared__ u16 counts[];
  u32 ids[MOST_ROUNDS], peers[MOST_ROUNDS];
  load_ids(p, ids);
  histogram(p, ids, peers, counts);
  for (u32 e = threadIdx.x; e < p.experts; e += blockDim.x) {
    u32 sum = 0;
    for (u32 w = 0; w < blockDim.x >> 5; w++) sum += counts[w * p.experts + e];
    p.counts[blockIdx.x * p.experts + e] = sum;
  }
}

// Exclusive sum of two numbers over the block's threads; `total` is the sum of all.
__device__ uint2 scan(uint2 v, uint2* part, uint2& total) {
  u32 warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  uint2 s = v;
  for (u32 d = 1; d < 32; d <<= 1) {
    u32 x = __shfl_up_sync(~0u, s.x, d), y = __shfl_up_sync(~0u, s.y, d);
    if (lane >= d) s.x += x, s.y += y;
  }
  __syncthreads();
  if (lane == 31) part[warp] = s;
  __syncthreads();
  uint2 before = make_uint2(0, 0);
  total = before;
  for (u32 w = 0; w < blockDim.x >> 5; w++) {
    if (w == warp) before = total;
    total.x += part[w].x, total.y += part[w].y;
  }
  return make_uint2(before.x + s.x - v.x, before.y + s.y - v.y);
}

extern "C" __global__ void __launch_bounds__(MOST_WARPS * 32) plan_place(Plan p) {
  extern __shared__ u16 counts[];  // [warps, experts], then u32 base[experts]
  const u32 warps = blockDim.x >> 5, warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  u32* base = (u32*)(counts + warps * p.experts + (warps * p.experts & 1));
  __shared__ uint2 part[MOST_WARPS];
  u32 ids[MOST_ROUNDS], peers[MOST_ROUNDS];
  load_ids(p, ids);
  histogram(p, ids, peers, counts);
  // where each expert begins, and where this block's slots of it do
  uint2 done = make_uint2(0, 0), total;
  for (u32 e0 = 0; e0 < p.experts; e0 += blockDim.x) {
    u32 e = e0 + threadIdx.x, all = 0, earlier = 0;
    if (e < p.experts) {
      if (gridDim.x == 1)
        for (u32 w = 0; w < warps; w++) all += counts[w * p.experts + e];
      else
#pragma unroll 8
        for (u32 b = 0; b < gridDim.x; b++) {
          u32 n = p.counts[b * p.experts + e];
          if (b < blockIdx.x) earlier += n;
          all += n;
        }
    }
    u32 tiles = p.tile ? (all + p.tile - 1) / p.tile : 0;
    uint2 at = scan(make_uint2(all, tiles), part, total);
    at.x += done.x, at.y += done.y;
    done.x += total.x, done.y += total.y;
    if (e < p.experts) {
      base[e] = at.x + earlier;
      if (blockIdx.x == 0) {
        p.offsets[e] = at.x;
        if (e + 1 == p.experts) p.offsets[p.experts] = at.x + all;
        for (u32 i = 0; i < tiles; i++) p.tiles[at.y + i] = make_uint2(e, at.x + i * p.tile);
      }
    }
  }
  if (blockIdx.x == 0 && threadIdx.x == 0 && p.tile_count) *p.tile_count = done.y;
  __syncthreads();
  // counts become what earlier warps have
  for (u32 e = threadIdx.x; e < p.experts; e += blockDim.x) {
    u32 sum = 0;
    for (u32 w = 0; w < warps; w++) {
      u32 n = counts[w * p.experts + e];
      counts[w * p.experts + e] = (u16)sum;
      sum += n;
    }
  }
  __syncthreads();
#pragma unroll
  for (u32 round = 0; round < MOST_ROUNDS; round++) {
    if (round == p.rounds) break;
    u32 slot = slot_of(p, round), id = ids[round];
    u32 at = NO_EXPERT;
    if (id != NO_EXPERT) {
      at = base[id] + counts[warp * p.experts + id] + __popc(peers[round] & ((1u << lane) - 1));
      p.order[at] = slot;
    }
    if (slot < p.slots && p.place) p.place[slot] = at;
    __syncwarp();
    if (id != NO_EXPERT && lane == __ffs(peers[round]) - 1) counts[warp * p.experts + id] += __popc(peers[round]);
    __syncwarp();
  }
}
