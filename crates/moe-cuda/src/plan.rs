//! The plan on the device: slots sorted by expert, and tiles of rows.

use crate::driver::Handle;
use crate::module::{Argument, Function, Launch, Modules};
use crate::sources::PLAN;
use crate::{Buffer, Error, Gpu, Result, Stream, View};

/// Warps of a block, as many as its shared memory has counts for; and how often each takes 32 slots, at most:
/// as in plan.cu.
const WARPS: [usize; 2] = [32, 8];
const ROUNDS: usize = 4;
/// Blocks that are as many as one block likes to add up the counts of.
const BLOCKS: usize = 64;
/// Slots that one block sorts at least where there are several.
const SLOTS: usize = 32 * WARPS[1];

/// The order of work of one batch: its T·k slots, sorted by expert, stably, so that an expert meets
/// its rows in row order; and tiles of at most `tile` rows of one expert. Slot `t·k + j` is the j-th
/// choice of row t. Lives on the device; the host never learns it.
#[derive(Debug)]
pub struct Plan {
    experts: usize,
    tile: usize,
    slots: usize,
    counts: Buffer<u32>,
    offsets: Buffer<u32>,
    order: Buffer<u32>,
    place: Buffer<u32>,
    tiles: Buffer<u32>,
    tile_count: Buffer<u32>,
    /// Of the last batch.
    pub(crate) top_k: usize,
    pub(crate) slots_used: usize,
}

impl Plan {
    /// Memory for batches of up to `slots` slots over `experts` experts, in tiles of `tile` rows.
    ///
    /// # Errors
    /// If the GPU has not enough memory, or a size is zero.
    pub fn new(gpu: &Gpu, slots: usize, experts: usize, tile: usize) -> Result<Self> {
        if slots == 0 || experts == 0 || tile == 0 || slots > u32::MAX as usize {
            let sizes = format!("{slots} slots, {experts} experts, tiles of {tile}");
            return Err(Error::input("plan", sizes));
        }
        let buffer = |len| Buffer::new(gpu, len, "the plan");
        Ok(Self {
            experts,
            tile,
            slots,
            counts: buffer(slots.div_ceil(SLOTS) * experts)?,
            offsets: buffer(experts + 1)?,
            order: buffer(slots)?,
            place: buffer(slots)?,
            tiles: buffer(2 * Self::most_tiles(slots, experts, tile))?,
            tile_count: buffer(1)?,
            top_k: 1,
            slots_used: 0,
        })
    }

    /// Bytes on the device of a plan of these sizes.
    pub fn bytes(slots: usize, experts: usize, tile: usize) -> usize {
        let counts = slots.div_ceil(SLOTS) * experts;
        let tiles = 2 * Self::most_tiles(slots, experts, tile.max(1));
        size_of::<u32>() * (counts + experts + 1 + 2 * slots + tiles + 1)
    }

    /// Number of experts.
    pub fn experts(&self) -> usize {
        self.experts
    }

    /// Rows of a tile.
    pub fn tile(&self) -> usize {
        self.tile
    }

    /// Most slots of a batch.
    pub fn slots(&self) -> usize {
        self.slots
    }

    /// `[experts + 1]`: where each expert's slots begin among the sorted ones.
    pub fn offsets(&self) -> View<'_, u32> {
        self.offsets.view()
    }

    /// `[slots]`: the slots by expert; as many as `offsets` ends with.
    pub fn order(&self) -> View<'_, u32> {
        self.order.view()
    }

    /// `[slots]`: where each slot stands in `order`; `u32::MAX` for one without expert here.
    pub fn place(&self) -> View<'_, u32> {
        self.place.view()
    }

    /// `[2 · tiles]`: expert and first sorted position of each tile.
    pub fn tiles(&self) -> View<'_, u32> {
        self.tiles.view()
    }

    /// `[1]`: how many tiles there are.
    pub fn tile_count(&self) -> View<'_, u32> {
        self.tile_count.view()
    }

    /// Tiles that batches of `slots` slots can have at most.
    pub(crate) fn tiles_for(&self, slots: usize) -> usize {
        Self::most_tiles(slots, self.experts, self.tile)
    }

    fn most_tiles(slots: usize, experts: usize, tile: usize) -> usize {
        slots.div_ceil(tile) + experts.min(slots)
    }
}

#[repr(C)]
struct RawPlan {
    ids: u64,
    slots: u32,
    experts: u32,
    tile: u32,
    rounds: u32,
    counts: u64,
    offsets: u64,
    order: u64,
    place: u64,
    tiles: u64,
    tile_count: u64,
}

// SAFETY: `struct Plan` of plan.cu.
unsafe impl Argument for RawPlan {}

/// The kernels that make a plan.
pub(crate) struct Planner {
    count: Function,
    place: Function,
    shared_bytes: usize,
}

impl Planner {
    pub(crate) fn new(modules: &Modules) -> Result<Self> {
        let shared_bytes = modules.gpu().properties().shared_bytes;
        let get = |name| {
            let function = modules.function(&PLAN, &[], name)?;
            // Room for the compiler's own few bytes of shared memory.
            function.allow_shared(shared_bytes as u32 - 1024)?;
            Ok::<_, Error>(function)
        };
        Ok(Self { count: get("plan_count")?, place: get("plan_place")?, shared_bytes })
    }

    pub(crate) fn plan(
        &self,
        stream: &Stream,
        ids: View<'_, u32>,
        top_k: usize,
        plan: &mut Plan,
    ) -> Result<()> {
        if ids.len() > plan.slots || top_k == 0 || !ids.len().is_multiple_of(top_k) {
            let sizes = format!("{} ids of top-k {top_k} in a plan for {}", ids.len(), plan.slots);
            return Err(Error::input("plan", sizes));
        }
        (plan.top_k, plan.slots_used) = (top_k, ids.len());
        // u16 for each warp and expert; behind them u32 for each expert.
        let shared =
            |warps: usize| (2 * warps * plan.experts).next_multiple_of(4) + 4 * plan.experts;
        let Some(warps) = WARPS.into_iter().find(|&w| shared(w) + 1024 <= self.shared_bytes) else {
            return Err(Error::input("plan", format!("{} experts are too many", plan.experts)));
        };
        let rounds = ids.len().div_ceil(32 * warps * BLOCKS).clamp(1, ROUNDS);
        let blocks = ids.len().div_ceil(32 * warps * rounds).max(1) as u32;
        let raw = RawPlan {
            ids: ids.pointer,
            slots: ids.len() as u32,
            experts: plan.experts as u32,
            tile: plan.tile as u32,
            rounds: rounds as u32,
            counts: plan.counts.view_mut().pointer,
            offsets: plan.offsets.view_mut().pointer,
            order: plan.order.view_mut().pointer,
            place: plan.place.view_mut().pointer,
            tiles: plan.tiles.view_mut().pointer,
            tile_count: plan.tile_count.view_mut().pointer,
        };
        let launch = Launch {
            grid: (blocks, 1),
            block: 32 * warps as u32,
            shared: shared(warps) as u32,
            cooperative: false,
        };
        // SAFETY: the one parameter is `struct Plan`; its buffers have the sizes that it states.
        unsafe {
            if blocks > 1 {
                self.count.launch(stream, launch, &[&raw])?;
            }
            self.place.launch(stream, launch, &[&raw])
        }
    }
}

const _: () = assert!(size_of::<Handle>() == 8, "device pointers and handles have 64 bits");
