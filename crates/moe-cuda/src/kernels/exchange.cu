// Rows between ranks, as far as this rank's GPU has to do with it: which rank each slot's expert is on, rows and
// slots packed by rank, what has arrived, and the sum of what comes back.
//
// Ranks are counted from this one on: number 0 is this rank, number d is rank (me + d) mod R. What stays here is
// written to its place at once. A part for one rank, or from one, has `room` places for it where that is not 0,
// else as many as it needs.
#include "common.cuh"

struct Homes {
  const u32 *offsets, *ranks, *locals;  // copies of each expert: the rank that holds one, and its place there
  u32 experts, all, me;                 // all: R
};

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
      u32 first = homes.offsets[id], copies = homes.offsets[id + 1] - first;
      // which copy: Knuth's multiplicative hash of the row
      u32 copy = first + (copies > 1 ? t * 2654435769u % copies : 0);
      to = (homes.ranks[copy] + homes.all - homes.me) % homes.all;
      local[slot] = homes.locals[copy];
      rows[t * homes.all + to] = to;
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
// integers with one for `tile` columns (many.cu); else f32.
struct Returned {
  const void *own, *far;
  const float *own_scales, *far_scales;
  const u32 *place, *offsets;
  u32 all, room, tile;
};

// out[t] = factor * sum over j of w[t, j] * the output of slot (t, j), in slot order and f32, as without ranks: the
// arithmetic of combine (rows.cu) and combine_slots (many.cu). Eight columns a thread.
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
      float w = weights[t * top_k + j];
      if (r.tile) {
        float scale = (d ? r.far_scales : r.own_scales)[at * tiles + piece * 8 / r.tile];
        add_scaled(sum, w, scale, ((const uint4*)(d ? r.far : r.own))[at * pieces + piece]);
      } else {
        const float4* from = (const float4*)(d ? r.far : r.own) + (at * pieces + piece) * 2;
        float4 a = from[0], b = from[1];
        float v[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
        for (int k = 0; k < 8; k++) sum[k] = __fadd_rn(sum[k], __fmul_rn(w, v[k]));
      }
    }
#pragma unroll
    for (int k = 0; k < 8; k++) {
      sum[k] *= factor;
      if (!finite(sum[k])) raise_fault(fault, FAULT_OUTPUT, t, piece * 8 + k, __float_as_uint(sum[k]));
      store_float(out.data, out.type, t * out.stride + piece * 8 + k, sum[k]);
    }
  }
}
