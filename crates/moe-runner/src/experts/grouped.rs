//! The one driver of grouped products: all experts of a batch, on all threads.
//!
//! ```text
//! gather:  each place's row, as its expert's first product reads it   x [places, ..]
//! first:   tiles of (a block's rows × some columns of I)              h [places, I]
//! middle:  rows of h, as the second product reads them                x [places, ..]
//! second:  tiles of (a block's rows × some columns of H)              out [places, H]
//! norm:    rows of out, where experts' outputs are normalised
//! ```
//! Each line is a parallel region; nothing happens between them, but that ranks with slices of the
//! same rows may agree on their largest magnitudes. Rows stand in plan order from the first line to
//! the last. A value depends on its row and its expert alone, so no result depends on the other rows
//! of a batch or on the number of threads.

use std::ops::Range;

use moe_kernels::arena::room;
use moe_kernels::region::{for_each, for_each_tile, for_each_with, rows_together};
use moe_kernels::rows::{RowsMut, Tile};

use super::{ExpertCall, ExpertShape};
use crate::Result;
use crate::plan::{Plan, TOGETHER};

/// One of an expert's two products.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Product {
    /// Gate and up.
    First,
    /// Down.
    Second,
}

/// What a kernel brings to the driver: its products, and the rows that they read.
pub(super) trait Products: Sync {
    /// Sizes of the experts.
    fn shape(&self) -> ExpertShape;

    /// Floats of memory that a row takes as a product reads it, at most.
    fn row_len(&self, product: Product) -> usize;

    /// Output features of a tile of `plan`'s rows, at most, so that `threads` threads all have some.
    fn tile(&self, product: Product, plan: &Plan, threads: usize) -> usize;

    /// Floats that a thread needs for a tile of `rows` rows.
    fn scratch(&self, rows: usize) -> usize;

    /// What becomes of a row before the first product, in f32: the slot's weight where it is applied
    /// there, quantisation unless the row is `quantised` already.
    fn enter(&self, expert: usize, row: &mut [f32], weight: f32, quantised: bool);

    /// What becomes of a row between the products, in f32. `whole` is the largest magnitude of the
    /// row that this one is a slice of; `scratch` is longer than the row.
    fn between(&self, expert: usize, row: &mut [f32], whole: Option<f32>, scratch: &mut [f32]);

    /// Writes a row as a product of `expert` reads it; `whole` as in [`between`](Self::between). Rows of
    /// one expert stand one after another, [`operand_len`](Self::operand_len) apart.
    fn operand(
        &self,
        product: Product,
        expert: usize,
        row: &[f32],
        whole: Option<f32>,
        into: &mut [f32],
    );

    /// Floats of a row as a product of `expert` reads it: at most [`row_len`](Self::row_len).
    fn operand_len(&self, product: Product, expert: usize) -> usize;

    /// The features `cols` of `act(gate·x, up·x)`, of all rows of the tile.
    fn first(&self, block: Block<'_>, tile: &mut Tile<'_>, scratch: &mut [f32]);

    /// The features `cols` of `down·h`, of all rows of the tile.
    fn second(&self, block: Block<'_>, tile: &mut Tile<'_>, scratch: &mut [f32]);

    /// Experts' outputs are normalised.
    fn normalises(&self) -> bool {
        false
    }

    /// Normalises an output row of `expert`.
    fn normalise(&self, _expert: usize, _row: &mut [f32]) {}
}

/// Some rows of one expert.
#[derive(Clone, Copy)]
pub(super) struct Block<'a> {
    pub(super) expert: usize,
    /// The rows, as the product reads them.
    pub(super) rows: &'a [f32],
    /// Their slots.
    pub(super) slots: &'a [u32],
    /// Weights of all slots.
    pub(super) weights: &'a [f32],
}

impl<'a> Block<'a> {
    /// Block `number` of `plan`, whose rows are in `memory`, at most `stride` floats each.
    fn new(
        products: &impl Products,
        product: Product,
        plan: &'a Plan,
        number: usize,
        (memory, stride): (&'a [f32], usize),
        weights: &'a [f32],
    ) -> Self {
        let places = plan.blocks()[number].clone();
        let expert = plan.expert(places.start);
        let len = places.len() * products.operand_len(product, expert);
        let rows = &memory[places.start * stride..][..len];
        Self { expert, rows, slots: &plan.planned()[places], weights }
    }
}

/// Bytes of the arena that `slots` planned slots need on `threads` threads.
pub(super) fn scratch_bytes(products: &impl Products, slots: usize, threads: usize) -> usize {
    room::<f32>(slots * row_len(products))
        + room::<f32>(slots * products.shape().intermediate)
        + room::<f32>(slots)
        + threads * room::<f32>(thread_scratch(products, slots))
}

fn row_len(products: &impl Products) -> usize {
    products.row_len(Product::First).max(products.row_len(Product::Second))
}

/// Floats of one thread: for a tile, for a row that comes in, or for one between the products and
/// another with one more column.
fn thread_scratch(products: &impl Products, slots: usize) -> usize {
    let ExpertShape { hidden, intermediate, .. } = products.shape();
    products.scratch(slots.min(TOGETHER)).max(hidden).max(2 * intermediate + 1)
}

/// All of it.
pub(super) fn forward(products: &impl Products, call: ExpertCall<'_>) -> Result<()> {
    let ExpertCall { rows, plan, weights, out, quantised, row_max, pool, arena } = call;
    let ExpertShape { hidden, intermediate, .. } = products.shape();
    let (slots, threads) = (plan.slots_planned(), pool.threads());
    if slots == 0 {
        // the other ranks wait for an answer, be it an empty one
        return row_max.map_or(Ok(()), |row_max| row_max(&mut []));
    }
    arena.reserve(scratch_bytes(products, slots, threads));
    let mut cut = arena.cut();
    let stride = row_len(products);
    let x = cut.floats(slots * stride);
    let h = cut.floats(slots * intermediate);
    let max = cut.floats(slots);
    let each = room::<f32>(thread_scratch(products, slots)) / size_of::<f32>();
    let scratch = cut.floats(threads * each);
    let planned = plan.planned();

    let parts = Parts::new(products, Product::First, plan, &mut *x, stride, threads);
    for_each_with(pool, scratch.chunks_exact_mut(each), parts, |scratch, part| {
        let (row, expert) = (&mut scratch[..hidden], part.expert);
        for (place, into) in part.rows() {
            let slot = planned[place];
            row.copy_from_slice(&rows[plan.row(slot) * hidden..][..hidden]);
            products.enter(expert, row, weights[slot as usize], quantised);
            products.operand(Product::First, expert, row, None, into);
        }
    });

    let mut h_rows = RowsMut::new(h, slots, intermediate, intermediate);
    let width = products.tile(Product::First, plan, threads);
    let tiles = h_rows.tiles(plan.blocks(), width);
    for_each_tile(pool, scratch, &tiles, |scratch, mut tile| {
        let block = Block::new(products, Product::First, plan, tile.block, (x, stride), weights);
        products.first(block, &mut tile, scratch);
    });

    // slices of rows that other ranks hold the rest of are quantised as the whole rows would be
    if let Some(row_max) = row_max {
        let together = rows_together(slots, intermediate * size_of::<f32>(), threads);
        let parts = max.chunks_mut(together).zip(h.chunks(together * intermediate));
        for_each(pool, parts, |(max, rows)| {
            for (max, row) in max.iter_mut().zip(rows.chunks_exact(intermediate)) {
                *max = row.iter().fold(0.0, |max, v| v.abs().max(max));
            }
        });
        row_max(max)?;
    }

    let (max, sliced) = (&*max, row_max.is_some());
    let parts = Parts::new(products, Product::Second, plan, &mut *x, stride, threads);
    for_each_with(pool, scratch.chunks_exact_mut(each), parts, |scratch, part| {
        let ((row, scratch), expert) = (scratch.split_at_mut(intermediate), part.expert);
        for (place, into) in part.rows() {
            row.copy_from_slice(&h[place * intermediate..][..intermediate]);
            let whole = sliced.then(|| max[place]);
            products.between(expert, row, whole, scratch);
            products.operand(Product::Second, expert, row, whole, into);
        }
    });

    let mut out_rows = RowsMut::new(out, slots, hidden, hidden);
    let width = products.tile(Product::Second, plan, threads);
    let tiles = out_rows.tiles(plan.blocks(), width);
    for_each_tile(pool, scratch, &tiles, |scratch, mut tile| {
        let block = Block::new(products, Product::Second, plan, tile.block, (x, stride), weights);
        products.second(block, &mut tile, scratch);
    });

    if products.normalises() {
        let together = rows_together(slots, hidden * size_of::<f32>(), threads);
        let parts = out.chunks_mut(together * hidden).enumerate();
        for_each(pool, parts, |(part, rows)| {
            for (i, row) in rows.chunks_exact_mut(hidden).enumerate() {
                products.normalise(plan.expert(part * together + i), row);
            }
        });
    }
    Ok(())
}

/// Some rows of one expert, to be written as a product reads them.
struct Part<'a> {
    expert: usize,
    places: Range<usize>,
    /// Floats from one row to the next.
    stride: usize,
    memory: &'a mut [f32],
}

impl<'a> Part<'a> {
    /// The rows' places, and their memory.
    fn rows(self) -> impl Iterator<Item = (usize, &'a mut [f32])> {
        self.places.zip(self.memory.chunks_exact_mut(self.stride))
    }
}

/// All rows of a plan, some at a time. A block's rows stand from its first place on, `stride` floats
/// for each place before it.
struct Parts<'a, P> {
    products: &'a P,
    product: Product,
    plan: &'a Plan,
    stride: usize,
    together: usize,
    /// The next block, and the memory from it on.
    block: usize,
    rest: &'a mut [f32],
    /// What is left of the block before.
    part: Part<'a>,
}

impl<'a, P: Products> Parts<'a, P> {
    fn new(
        products: &'a P,
        product: Product,
        plan: &'a Plan,
        memory: &'a mut [f32],
        stride: usize,
        threads: usize,
    ) -> Self {
        let together = rows_together(plan.slots_planned(), stride * size_of::<f32>(), threads);
        let part = Part { expert: 0, places: 0..0, stride: 1, memory: &mut [] };
        Self { products, product, plan, stride, together, block: 0, rest: memory, part }
    }
}

impl<'a, P: Products> Iterator for Parts<'a, P> {
    type Item = Part<'a>;

    fn next(&mut self) -> Option<Part<'a>> {
        if self.part.places.is_empty() {
            let places = self.plan.blocks().get(self.block)?.clone();
            self.block += 1;
            let (memory, rest) =
                std::mem::take(&mut self.rest).split_at_mut(places.len() * self.stride);
            self.rest = rest;
            let expert = self.plan.expert(places.start);
            let stride = self.products.operand_len(self.product, expert);
            self.part = Part { expert, places, stride, memory };
        }
        let Part { expert, stride, .. } = self.part;
        let places = &mut self.part.places;
        let next = places.end.min(places.start + self.together);
        let places = std::mem::replace(&mut places.start, next)..next;
        let (memory, rest) =
            std::mem::take(&mut self.part.memory).split_at_mut(places.len() * stride);
        self.part.memory = rest;
        Some(Part { expert, places, stride, memory })
    }
}
