// Rows between ranks, as far as this rank's GPU has to do with it: which rank each slot's expert is on, rows and
// slots packed by rank, what has arrived, and the sum of what comes back.
//
// Ranks are counted from this one on: number 0 is this rank, number d is rank (me + d) mod R. What stays here is
// written to its place at once. A part for one rank, or from one, has `room` places for it where that is not 0,
// else as many as it needs.
#include "common.cuh"

struct Homes {
  const u32 *offsets, *ranks, *locals;  // copies of each expert: the rank that holds one, and its place there
  u64* load;                            // [experts]: slots that each was chosen for, where they are counted
  u32 experts, all, me;                 // all: R
};
__device__ __forceinline__ void count_load(const Homes& homes, u32 id) {
  if (homes.load) asm volatile("red.relaxed.gpu.global.add.u64 [%0], 1;" ::"l"(homes.load + id) : "memory");
}

// The rank and the place there of expert `id`'s copy for row t.
struct Home {
  u32 number, local;
};
__device__ __forceinline__ Home home_of(const Homes& homes, u32 id, u32 t) {
  u32 first = homes.offsets[id], copies = homes.offsets[id + 1] - first;
  // which copy: Knuth's multiplicative hash of the row
  u32 copy = first + (copies > 1 ? t * 2654435769u % copies : 0);
  return {(homes.ranks[copy] + homes.all - homes.me) % homes.all, homes.locals[copy]};
}

// Warp t: dest[t, j] = number of the rank of slot j's expert, or NO_EXPERT; local[t, j]: the expert's place there;
// rows[t, d] = d where row t has a slot there, else NO_EXPERT.
extern "C" __global__ void slot_homes(const u32* ids, u32 tokens, u32 top_k, Homes homes, u32* dest, u32* local, u32* rows) {
  u32 t = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5), lane = threadIdx.x & 31;
  if (t >= tokens) return;
  for (u32 d = lane; d < homes.all; d += 32) rows[t * homes.all + d] = NO_EXPERT;
  __syncwarp();
  for (u32 j = lane; j < top_k; j += 32) {
    u32 slot = t * top_k + j, id = ids[slot], to = NO_EXPERT;
    if (id < homes.experts) {
      Home home = home_of(homes, id, t);
      to = home.number, local[slot] = home.local;
      rows[t * homes.all + to] = to;
      count_load(homes, id);
    }
    dest[slot] = to;
  }
}

// What this rank has for every rank, in the order of the ranks: slots [R], rows [R].
extern "C" __global__ void part_counts(const u32* slot_offsets, const u32* row_offsets, u32 all, u32 me, u32* counts) {
  for (u32 d = threadIdx.x; d < all; d += blockDim.x) {
    u32 rank = (me + d) % all;
    counts[rank] = slot_offsets[d + 1] - slot_offsets[d];
    counts[all + rank] = row_offsets[d + 1] - row_offsets[d];
  }
}

// Place `p` of the parts, which begin at `offsets`: the place in what stays here, or, with `far` set, in what goes.
__device__ __forceinline__ u32 place_of(const u32* offsets, u32 d, u32 p, u32 room) {
  if (d == 0) return p;
  return room ? (d - 1) * room + p - offsets[d] : p - offsets[1];
}

// Slots sorted by rank: {the expert's place there, its row among those that go there}.
extern "C" __global__ void pack_slots(const u32* order, const u32* slot_offsets, const u32* dest, const u32* local, const u32* row_place, const u32* row_offsets,
                                      u32 all, u32 top_k, u32 room, uint2* stay, uint2* go, u32* fault) {
  for (u32 p = blockIdx.x * blockDim.x + threadIdx.x; p < slot_offsets[all]; p += gridDim.x * blockDim.x) {
    u32 slot = order[p], d = dest[slot];
    uint2 record = make_uint2(local[slot], row_place[slot / top_k * all + d] - row_offsets[d]);
    if (room && p - slot_offsets[d] >= room) raise_fault(fault, FAULT_CAPACITY, slot / top_k, room, d);
    else (d ? go : stay)[place_of(slot_offsets, d, p, room)] = record;
  }
}

// Rows sorted by rank, of `pieces` times 16 bytes. One warp a row.
extern "C" __global__ void pack_rows(const uint4* x, u64 stride, const u32* order, const u32* row_offsets, u32 all, u32 room, u32 pieces, uint4* stay, uint4* go, u32* fault) {
  u32 warps = blockDim.x >> 5, lane = threadIdx.x & 31;
  for (u32 q = blockIdx.x * warps + (threadIdx.x >> 5); q < row_offsets[all]; q += gridDim.x * warps) {
    u32 row = order[q] / all, d = order[q] % all;
    if (room && q - row_offsets[d] >= room) {
      if (lane == 0) raise_fault(fault, FAULT_CAPACITY, row, room, d);
      continue;
    }
    const uint4* from = x + row * stride;
    uint4* to = (d ? go : stay) + (u64)place_of(row_offsets, d, q, room) * pieces;
#pragma unroll 4
    for (u32 c = lane; c < pieces; c += 32) to[c] = from[c];
  }
}

// What has arrived, `places` records: ids and rows of the slots. counts [R, 2 R]: what every rank has for every rank; with
// room they are not read, and places that nobody filled say NO_EXPERT.
extern "C" __global__ void unpack_slots(const uint2* records, const u32* counts, u32 all, u32 me, u32 slot_room, u32 row_room, u32 places, u32* ids, u32* rows) {
  for (u32 s = blockIdx.x * blockDim.x + threadIdx.x; s < places; s += gridDim.x * blockDim.x) {
    u32 row_base = s / (slot_room ? slot_room : 1) * row_room;
    if (!slot_room) {
      u32 slot_base = 0;
      row_base = 0;
      for (u32 d = 0; d < all; d++) {
        const u32* of = counts + (me + d) % all * 2 * all;
        slot_base += of[me];
        if (s < slot_base) break;
        row_base += of[all + me];
      }
    }
    ids[s] = records[s].x, rows[s] = row_base + records[s].y;
  }
}

// to[p] = rows[order[p]]: the rows of slots that are sorted by expert.
extern "C" __global__ void rows_in_order(const u32* rows, const u32* order, const u32* offsets, u32 experts, u32* to) {
  for (u32 p = blockIdx.x * blockDim.x + threadIdx.x; p < offsets[experts]; p += gridDim.x * blockDim.x) to[p] = rows[order[p]];
}

// Outputs of slots: of this rank's experts for its own rows, and those that have come back. With scales, 16-bit
// integers with one for `tile` columns (many.cuh); else f32.
struct Returned {
  const void *own, *far;
  const float *own_scales, *far_scales;
  const u32 *place, *offsets;
  u32 all, room, tile;
};

// sum += w * eight columns of the output at place `at` of `values`.
__device__ __forceinline__ void add_output(float (&sum)[8], float w, const void* values, const float* scales, u64 at, u32 pieces, u32 piece, u32 tile, u32 tiles) {
  if (tile) {
    add_scaled(sum, w, scales[at * tiles + piece * 8 / tile], ((const uint4*)values)[at * pieces + piece]);
    return;
  }
  const float4* from = (const float4*)values + (at * pieces + piece) * 2;
  float4 a = from[0], b = from[1];
  float v[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
  for (int k = 0; k < 8; k++) sum[k] = __fadd_rn(sum[k], __fmul_rn(w, v[k]));
}
// Eight columns of row t of the output; what is not finite is a fault.
__device__ __forceinline__ void store_sum(float (&sum)[8], float factor, const Rows& out, u32 t, u32 piece, u32* fault) {
#pragma unroll
  for (int k = 0; k < 8; k++) {
    sum[k] *= factor;
    if (!finite(sum[k])) raise_fault(fault, FAULT_OUTPUT, t, piece * 8 + k, __float_as_uint(sum[k]));
  }
  u64 at = t * out.stride + piece * 8;
  bool aligned = ((u64)out.data & 15) == 0 && out.stride % 8 == 0;
  if (aligned && out.type == F32) {
    float4* to = (float4*)((float*)out.data + at);
    to[0] = make_float4(sum[0], sum[1], sum[2], sum[3]);
    to[1] = make_float4(sum[4], sum[5], sum[6], sum[7]);
  } else if (aligned && out.type == BF16) {
    *(uint4*)((u16*)out.data + at) =
        make_uint4(f32x2_to_bf16x2(sum[0], sum[1]), f32x2_to_bf16x2(sum[2], sum[3]), f32x2_to_bf16x2(sum[4], sum[5]), f32x2_to_bf16x2(sum[6], sum[7]));
  } else {
#pragma unroll
    for (int k = 0; k < 8; k++) store_float(out.data, out.type, at + k, sum[k]);
  }
}

// out[t] = factor * sum over j of w[t, j] * the output of slot (t, j), in slot order and f32, as without ranks: the
// arithmetic of combine (rows.cu) and combine_slots (sorted.cu). Eight columns a thread.
extern "C" __global__ void combine_returned(Returned r, const float* weights, u32 top_k, float factor, Rows out, u32* fault) {
  u32 pieces = out.cols / 8, tiles = r.tile ? (out.cols + r.tile - 1) / r.tile : 0;
  u64 n = (u64)out.rows * pieces;
  for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (u64)gridDim.x * blockDim.x) {
    u32 t = (u32)(i / pieces), piece = (u32)(i - (u64)t * pieces);
    float sum[8] = {};
#pragma unroll 4
    for (u32 j = 0; j < top_k; j++) {
      u32 p = r.place[t * top_k + j], d = 0;
      if (p == NO_EXPERT) continue;
      if (r.room)
        while (p >= r.offsets[d + 1]) d++;
      else d = p >= r.offsets[1];
      if (r.room && p - r.offsets[d] >= r.room) continue;  // told already
      u64 at = place_of(r.offsets, d, p, r.room);
      add_output(sum, weights[t * top_k + j], d ? r.far : r.own, d ? r.far_scales : r.own_scales, at, pieces, piece, r.tile, tiles);
    }
    store_sum(sum, factor, out, t, piece, fault);
  }
}

// ---- one-sided: ranks write straight into each other's memory ---------------------------------------------------
// A rank has a window for what arrives, one for its slots' outputs, and one of signals. `windows` [3, R] are their
// addresses, by number. Every rank's part of what arrives has places for `most` rows of `top_k` slots: row t is at
// place t of it, slot (t, j) at t * top_k + j. So nothing is counted, and an output's place is that of its slot.
//
//   arrivals   rows [R, most] of `pieces` times 16 bytes, then ids [R, most, top_k] from byte `ids_at` on
//   outputs    values [most, top_k], then scales from a byte on
//   signals    how often each rank, this one first, has come to either meeting [2, R], and in which layer [2, R]
struct Windows {
  const u64* windows;
  u32 all, most, top_k, pieces;
  u64 ids_at;
};
__device__ __forceinline__ u64 window(const Windows& w, u32 which, u32 d) { return w.windows[which * w.all + d]; }

// Block t: row t to every rank that has an expert of its slots, and to all what they have of them: the expert's place, or
// NO_EXPERT. Rows from `tokens` on are nobody's.
extern "C" __global__ void __launch_bounds__(128) put_rows(const uint4* x, u64 stride, const u32* ids, u32 tokens, Homes homes, Windows w) {
  u32 t = blockIdx.x;
  __shared__ u32 wanted;
  if (threadIdx.x == 0) wanted = 0;
  __syncthreads();
  for (u32 j = threadIdx.x; j < w.top_k; j += blockDim.x) {
    u32 id = t < tokens ? ids[t * w.top_k + j] : NO_EXPERT, to = NO_EXPERT, local = NO_EXPERT;
    if (id < homes.experts) {
      Home home = home_of(homes, id, t);
      to = home.number, local = home.local;
      atomicOr(&wanted, 1u << to);
      count_load(homes, id);
    }
    for (u32 d = 0; d < w.all; d++) {
      u64 from_me = (w.all - d) % w.all;  // this rank's number there
      ((u32*)(window(w, 0, d) + w.ids_at))[(from_me * w.most + t) * w.top_k + j] = d == to ? local : NO_EXPERT;
    }
  }
  __syncthreads();
  const uint4* from = x + t * stride;
  for (u32 left = wanted; left; left &= left - 1) {
    u32 d = __ffs(left) - 1;
    uint4* to = (uint4*)window(w, 0, d) + ((u64)((w.all - d) % w.all) * w.most + t) * w.pieces;
#pragma unroll 4
    for (u32 c = threadIdx.x; c < w.pieces; c += blockDim.x) to[c] = from[c];
  }
}

// One thread a rank: tells it that all that was put before is there, and waits for the same from it. Gives up where the
// host says so in `stop`, or after `limit` nanoseconds, which is a fault.
extern "C" __global__ void meet_ranks(Windows w, u32 meeting, u32 layer, const u32* stop, u64 limit, u32* fault) {
  __shared__ u32 now;
  u32 *mine = (u32*)window(w, 2, 0) + meeting * w.all, layers = 2 * w.all;
  if (threadIdx.x == 0) {
    // for who asks for whom it waits
    mine[layers] = layer;
    now = mine[0] += 1;
  }
  __syncthreads();
  for (u32 d = threadIdx.x; d < w.all; d += blockDim.x) {
    if (d == 0) continue;
    u32* there = (u32*)window(w, 2, d) + meeting * w.all + (w.all - d);
    *(volatile u32*)(there + layers) = layer;
    __threadfence_system();
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(there), "r"(now) : "memory");
  }
  for (u32 d = threadIdx.x; d < w.all; d += blockDim.x) {
    if (d == 0) continue;
    const u32* here = mine + d;
    u64 begin = 0, at = 0;
    for (u32 turn = 1;; turn++) {
      u32 seen;
      asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(seen) : "l"(here) : "memory");
      if ((int)(seen - now) >= 0) break;
      if (turn % 1024) continue;
      if (*(volatile const u32*)stop) break;
      asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(at));
      if (begin == 0) begin = at;
      if (at - begin > limit) {
        raise_fault(fault, FAULT_RANK, 0, d, 0);
        break;
      }
    }
  }
}

// Outputs of slots that have arrived to the ranks that they are of: of products that do not put them there themselves.
// One warp a slot; `slot_pieces` times 16 bytes of values, and scales behind `scales_at`.
extern "C" __global__ void put_outputs(const uint4* values, const float* scales, u32 slot_pieces, u32 slot_scales, u64 scales_at, u32 experts, Windows w) {
  const u32* ids = (const u32*)(window(w, 0, 0) + w.ids_at);
  u32 warps = blockDim.x >> 5, lane = threadIdx.x & 31, part = w.most * w.top_k;
  for (u32 s = blockIdx.x * warps + (threadIdx.x >> 5); s < w.all * part; s += gridDim.x * warps) {
    if (ids[s] >= experts) continue;
    u64 to = window(w, 1, s / part), at = s % part;
    uint4* there = (uint4*)to + at * slot_pieces;
    float* scales_there = (float*)(to + scales_at) + at * slot_scales;
#pragma unroll 4
    for (u32 c = lane; c < slot_pieces; c += 32) there[c] = values[(u64)s * slot_pieces + c];
    for (u32 c = lane; c < slot_scales; c += 32) scales_there[c] = scales[(u64)s * slot_scales + c];
  }
}

// As combine_returned, of outputs that lie by slot. Slots whose id is no expert are left out.
extern "C" __global__ void combine_put(const void* values, const float* scales, u32 tile, const u32* ids, u32 experts, const float* weights, u32 top_k, float factor, Rows out, u32* fault) {
  u32 pieces = out.cols / 8, tiles = tile ? (out.cols + tile - 1) / tile : 0;
  u64 n = (u64)out.rows * pieces;
  for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (u64)gridDim.x * blockDim.x) {
    u32 t = (u32)(i / pieces), piece = (u32)(i - (u64)t * pieces);
    float sum[8] = {};
#pragma unroll 4
    for (u32 j = 0; j < top_k; j++) {
      u32 slot = t * top_k + j;
      if (ids[slot] < experts) add_output(sum, weights[slot], values, scales, slot, pieces, piece, tile, tiles);
    }
    store_sum(sum, factor, out, t, piece, fault);
  }
}
